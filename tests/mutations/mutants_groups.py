"""Mutations of what carries the options of param groups to runs, for mutants_table.py."""

GROUPS_TESTS = "tests/space/test_groups.py -k '{}'"
OWN = GROUPS_TESTS.format("own_radius and (reference or cpu)")
STEPS = GROUPS_TESTS.format("own_options and (reference or cpu)")
KINDS = GROUPS_TESTS.format("(other_kinds or same_shapes) and (reference or cpu)")
MOVING = GROUPS_TESTS.format("radii_that_move and reference")
NUMBERS = GROUPS_TESTS.format("kept and numbers_of")
SUMS = GROUPS_TESTS.format("(sums_of or of_one_group) and reference")
PILE = "tests/step/test_hazards.py -k pile_up"
PER_RUN = "tests/ops/test_per_run.py -k '{}'"
REFERENCE = PER_RUN.format("reference")
FOREACH = PER_RUN.format("foreach and (float64 or may_differ)")
FOREACH_STEP = GROUPS_TESTS.format("own_options and foreach")
HYPERGRADIENT = "tests/learning/test_hypergradient.py -k 'reference and ({})'"

GROUPS = [
    (
        "lets_kernels/space/buckets.py",
        NUMBERS,
        [
            ("values[g] is first or values[g] == first for g in", "values[g] is first for g in"),
            ("all(values[g] is first or", "any(values[g] is first or", OWN),
            ("[values[own[i]] for i in indices]", "[values[own[j]] for j, _ in enumerate(indices)]", OWN),
            ("not all(map(operator.is_, own", "not any(map(operator.is_, own", MOVING),
            ("if not all(map(operator.is_, own, repeat(own[0]))):", "if True:", GROUPS_TESTS.format("LETSSAM")),
            ("if not floats or own.count(own[0]) < len(own):", "if True:"),
            ("own.count(own[0]) < len(own)", "False", OWN),
            ("self._numbers is None or self._numbers[0] != key", "True"),
            ("self._numbers is None or self._numbers[0] != key", "self._numbers is None", MOVING),
            ("[each[g] for g in self.group_of], torch.float64", "[key[0] for g in self.group_of], torch.float64", OWN),
            ("uploaded([lines[g] for g in", "uploaded([0 for g in", MOVING),
            ("numbers.dim() == 0 or len(indices)", "True or len(indices)", OWN),
            ("numbers.dim() == 0 or len(indices)", "len(indices)"),
            ("= uploaded(indices, torch.int64", "= uploaded(range(len(indices)), torch.int64", OWN),
            ("                self._chosen.clear()", "                pass", PILE),
            ("float(groups[g][name]) for g in", "float(groups[self.bucket.present[0]][name]) for g in", STEPS),
            ("found.setdefault(group[i], []).append(j)", "found.setdefault(group[j], []).append(j)", SUMS),
            ("found.setdefault(group[i], []).append(j)", "found.setdefault(group[i], []).append(i)", SUMS),
            (
                "geometry(member.param, member.name, groups[member.group])",
                "geometry(member.param, member.name, groups[0])",
                OWN,
            ),
        ],
    ),
    (
        "lets_kernels/space/layout.py",
        GROUPS_TESTS.format("joins and reference"),
        [
            ("names.get(id(p))), index, place)", "names.get(id(p))), 0, place)"),
            (
                "names.get(id(p))), index, place)",
                "names.get(id(p))), index, 0)",
                GROUPS_TESTS.format("dropped and reference"),
            ),
        ],
    ),
    (
        "lets_kernels/base/fused.py",
        KINDS,
        [
            ("(*self.flags, *(option for _, option in self.lists if option is not None))", "(*self.flags,)"),
            (
                "(*self.flags, *(option for _, option in self.lists if option is not None))",
                "tuple(option for _, option in self.lists if option is not None)",
            ),
            ("if len(by_kind) == 1:", "if by_kind:"),
            ("kind_of[group_of[i]], []).append(j)", "kind_of[group_of[j]], []).append(j)"),
            ("[(groups[group_of[runs.indices[places[0]]]], runs.only", "[(groups[0], runs.only"),
            ("runs.only(places)) for places in by_kind", "runs) for places in by_kind"),
            ("dirty if place == len(steps) - 1 else", "dirty if place == 0 else"),
            ("dirty if place == len(steps) - 1 else dirty.clone()", "dirty"),
            ("dirty if place == len(steps) - 1 else dirty.clone()", "dirty.clone()"),
            ("options.append(runs.option(groups, name))", "options.append(float(group[name]))", STEPS),
            ('float(groups[g]["betas"][k])', 'float(group["betas"][k])', STEPS),
            (
                "getattr(b.ops, self.op)(runs.weights, grads, *lists, b.saved, dirty,",
                "getattr(b.ops, self.op)(runs.weights, grads, *lists, b.saved, b.dirty,",
            ),
        ],
    ),
    (
        "lets_kernels/base/state.py",
        KINDS,
        [
            ("return name, runs.indices", "return name, ()"),
            ("if len(b.found_state) >= _REMEMBERED:", "if False:", PILE),
            (
                "        b.found_state.clear()\n        return None",
                "        return None",
                "tests/base/test_fused.py -k replaced_state",
            ),
        ],
    ),
    (
        "lets_kernels/step/step.py",
        GROUPS_TESTS.format("shared_radius and reference"),
        [
            ("rho = one\n", "rho = one * share\n"),
            ("one = rho if radius.shared else None", "one = rho", OWN),
            ("radius.value(g, first.groups[g], moment)", "radius.value(0, first.groups[0], moment)", OWN),
            (
                "self.rho.append(b.numbers(self.radii))",
                "self.rho.append(b.numbers(dict.fromkeys(self.radii, self.radii[0])))",
                OWN,
            ),
        ],
    ),
    (
        "lets_kernels/step/precision.py",
        "tests/step/test_precision.py -k 'of_groups and reference'",
        [
            ("a.bucket.of_runs(rho[a.bucket.index], a.runs.indices)", "rho[a.bucket.index][: len(a.runs.indices)]"),
            ("zip(a.xi if isinstance(a.xi, list) else", "zip(a.xi[:1] * count if isinstance(a.xi, list) else"),
            ("rho.expand(count).unbind()", "rho[:1].expand(count).unbind()"),
        ],
    ),
    (
        "lets_kernels/parts/passes.py",
        SUMS,
        [
            ("    if count == 1:", "    if False:", MOVING),
            ("    if count == 1:", "    if True:"),
            ("return [(runs.bucket.present[0], runs)]", "return [(0, runs)]"),
            ("[(group, runs.only(places)) for", "[(0, runs.only(places)) for"),
            ("[(group, runs.only(places)) for", "[(group, runs) for"),
            ("each.squares = add_up(squares, b.device)", "each.squares = squares[0]", MOVING),
            ("            squares.append(found[0])", "            squares = [found[0]]", MOVING),
            ("by_group[line] += b.parts * found.to(self.home)", "by_group[line] = b.parts * found.to(self.home)"),
        ],
    ),
    (
        "lets_kernels/learning/hypergradient.py",
        HYPERGRADIENT.format("radius_a_group"),
        [
            ("group if alone else lr", "group if alone else 0", HYPERGRADIENT.format("enters_the_one")),
            ("alone = per_group or isinstance(lr, Tensor)", "alone = isinstance(lr, Tensor)"),
            ("(group, []))[1].extend(places)", "(group, places))", GROUPS_TESTS.format("LETSSAM and reference")),
            ("-self.lr[group] * bucket.parts", "-self.lr[0] * bucket.parts", HYPERGRADIENT.format("enters_the_one")),
            ("-self.lr[group] * self.slope", "-self.lr[0] * self.slope"),
            ("self.rho[group].to(near.device)", "self.rho[0].to(near.device)"),
            ("indices = tuple(both[j] for j in places)", "indices = tuple(places)", SUMS),
            ("part = both.only(places)", "part = both"),
        ],
    ),
    (
        "lets_kernels/parts/direction/base.py",
        HYPERGRADIENT.format("radius_a_group and asam"),
        [
            ("xi = [self.xi[j] for j in places]", "xi = self.xi[: len(places)]"),
            ("vectors=[self.vectors[j] for j in places]", "vectors=self.vectors[: len(places)]"),
        ],
    ),
    (
        "lets_kernels/parts/direction/noise.py",
        GROUPS_TESTS.format("precision_of_a_group and reference"),
        [
            ('float(first.groups[g]["weight_decay"])', 'float(first.groups[0]["weight_decay"])'),
            ("b.by_run(damping, runs.indices)", "damping[0]"),
        ],
    ),
    (
        "lets_kernels/parts/direction/mask.py",
        GROUPS_TESTS.format("dropped and reference"),
        [("offsets[b.group_of[i]] + b.places[i]", "offsets[0] + b.places[i]")],
    ),
    (
        "lets_kernels/learning/learned.py",
        HYPERGRADIENT.format("radius_a_group"),
        [("sums[group if self.per_group else 0]", "sums[0]")],
    ),
    (
        "lets_kernels/ops/reference/shared.py",
        REFERENCE,
        [
            ("return given * len(table) if len(given) == 1 else given", "return given[:1] * len(table)"),
            (
                "return rho.flatten().expand(len(table)).unbind()",
                "return rho.flatten()[:1].expand(len(table)).unbind()",
            ),
            ("if count not in (1, len(table)):", "if False:"),
        ],
    ),
    (
        "lets_kernels/ops/foreach/shared.py",
        FOREACH,
        [
            ("isinstance(x, Sequence) and len(x) != 1 for x", "False for x"),
            ("found.setdefault(own, []).append(place)", "found.setdefault(own[:1], []).append(place)"),
            ("found.setdefault(own, []).append(place)", "found.setdefault(own[1:], []).append(place)"),
            ("            plan.alike.clear()", "            pass", "tests/ops/test_foreach.py -k pile_up"),
            ("    if key not in plan.alike:", "    if True:", "tests/ops/test_foreach.py -k pile_up"),
            ("[(places, table[places]) for", "[(places, table[: len(places)]) for"),
            ("else [tensors[i] for i in self.places]", "else list(tensors)[: len(self.places)]"),
            ("tuple(x[places[0]] for x in key)", "tuple(x[0] for x in key)"),
        ],
    ),
    (
        "lets_kernels/ops/foreach/norm.py",
        FOREACH,
        [
            ("filter_norms, p.numbers[0], q)", "filter_norms, parts[0].numbers[0], q)"),
            ("return torch.stack(sums).sum()", "return torch.stack(sums)[-1]"),
        ],
    ),
    (
        "lets_kernels/ops/foreach/perturb.py",
        FOREACH,
        [
            ("if rho.numel() != 1 or differ(xi):", "if rho.numel() != 1:"),
            ("if rho.numel() != 1 or differ(xi):", "if differ(xi):"),
            ("part.places[0] if rho.numel() > 1 else 0", "0"),
            ("alike(table, xi, rho.flatten().tolist())", "alike(table, xi, [0.0])"),
        ],
    ),
    (
        "lets_kernels/ops/foreach/step.py",
        FOREACH_STEP,
        [
            ("(params, grads, momenta)), saved, dirty.clone()", "(params, grads, momenta)), saved, dirty"),
            ("own += [saved, dirty.clone()", "own += [saved, dirty"),
            ("restore_sgd_(*own)\n        dirty.fill_(0)", "restore_sgd_(*own)\n        pass"),
            ("restore_adamw_(*own)\n        dirty.fill_(0)", "restore_adamw_(*own)\n        pass"),
            ("[steps[i] for i in part.places]", "steps[: len(part.places)]", FOREACH_STEP),
            ("alike(table, lr, momentum, weight_decay)", "alike(table, lr, momentum)", FOREACH),
        ],
    ),
]
