"""Mutations of the parts of the other methods, killed by the transcriptions of the papers; see mutants_table.py."""

DIRECTION = "lets_kernels/parts/direction/"
ROBUST = "tests/methods/test_family_robust.py -k 'cpu and not_finite'"
ZERO = "tests/methods/test_family_robust.py -k 'cpu and zero'"
SAMPA = "tests/methods/test_sampa.py"
SEVERAL = "tests/methods/test_multistep.py"
AUTHORS = "tests/methods/test_family_robust.py -k authors_order"
PIECES = "tests/step/test_micro.py -k 'bsam or precision'"
TEN = "tests/methods/test_family.py -k 'cpu and every_method and ({})'"

GROUPS = [
    (
        DIRECTION + "average.py",
        TEN.format("friendly or vasso"),
        [
            ("super().__init__(1 - self.theta, 0.0, 1.0)", "super().__init__(self.theta, 0.0, 1.0)"),
            ("(1 + old * (1 - self.decay), -old)", "(1.0, -old)"),
            ("(1.0, -self.sigma) if update_first", "(1.0, self.sigma) if update_first"),
            ("squared if share is None else share", "squared"),
            ("gate = finite.double()", "gate = torch.ones_like(finite).double()", ROBUST),
        ],
    ),
    (
        "lets_kernels/parts/joined.py",
        "tests/state/test_joined.py -k 'not delta'",
        [
            ("[*self._own(), *(PREFIX + name for name in self._kept())]", "[*self._own(), *self._kept()]"),
            ("found if is_spread(found) else spread_as(found, self._p)", "found.clone()"),
            ("        return bool(self.base.state)\n", "        return len(self) > 0\n"),
            ("self.base.state = state if isinstance", "self.base.state = self.base.state if isinstance"),
            ("        self.held.state.clear()\n", ""),
            ("            state.pop(key, None)\n", ""),
            ("if own and p not in self.base.state)", "if p not in self.base.state)"),
            ("                self.check(p, PREFIX + name, value)\n", "                pass\n"),
        ],
    ),
    (
        DIRECTION + "gradient.py",
        TEN.format("fisher"),
        [("Ascent(runs, runs.grads, self.eta, self.q)", "Ascent(runs, runs.grads, 1.0, self.q)")],
    ),
    (
        DIRECTION + "noise.py",
        TEN.format("rsam or random or bsam"),
        [
            ("count += sum(elements(b.params[i]) for i in runs.indices)", "count += len(runs.indices)"),
            ("b.filter_norms.sqrt_()", "pass"),
            ("draw, self.lam, self.gamma))", "draw, self.gamma, self.lam))"),
            ("std = 1 / math.sqrt(self.data_size)", "std = 1 / self.data_size"),
            ("waits = not self.update_first or first.pieces > 1", "waits = first.pieces > 1"),
            ("*first.draw(b, NOISE, first.piece), 0.0, std)", "*first.draw(b, NOISE), 0.0, std)", PIECES),
            ("torch.float32)) / first.pieces", "torch.float32)) / 2", PIECES),
            ("self._next[b.index].flat += flat", "self._next[b.index].flat = flat", PIECES),
            ("        if self.update_first or not second.runs:\n", "        if not second.runs:\n", PIECES),
            ("        if first.piece == 0:\n", "        if first.piece < 0:\n", AUTHORS),
            ("tuple(sorted(w.indices))", "tuple(range(len(w.precisions)))", PIECES),
        ],
    ),
    (
        DIRECTION + "mask.py",
        TEN.format("sparse or esam"),
        [
            ("        if self.drawn_norm:\n", "        if not self.drawn_norm:\n"),
            ("first.total([self.ascent(runs, first.groups).total() for runs in first.runs])", "first.squared_norm"),
            ("squared if share is None else share", "squared"),
            ("total * self.beta**2, norm", "total * self.beta, norm"),
            ("kept = max(1, round((1 - self.sparsity) * size))", "kept = max(1, round(self.sparsity * size))"),
            ("(low >> 1) + (high >> 1) + (low & high & 1)", "low + (high - low) // 2"),
            ("first.squared_norm if due else first.total(shares))", "first.total(shares) / 2)"),
        ],
    ),
    (
        DIRECTION + "ahead.py",
        SAMPA + " -k cpu",
        [
            ("minus * decay", "minus"),
            ("minus * momentum", "minus"),
            ("if moving and momentum:", "if False:"),
            ("finite.double().to(b.device)", "one.to(b.device)"),
            ("torch.where(finite, first.total(shares), torch.nan)", "first.total(shares)"),
            ("if issubclass(first.base.kind, torch.optim.SGD):", 'if "momentum" in group:', SAMPA + " -k alone"),
        ],
    ),
    (
        DIRECTION + "multistep.py",
        TEN.format("multi-step or lookbehind"),
        [
            ("if not self.renormalize:", "if self.renormalize:"),
            ("found.total.rsqrt()", "found.total.reciprocal()"),
            ("if first.ascent == 0:", "if first.ascent <= 1:"),
            ("torch.zeros_like(b.saved)", "torch.ones_like(b.saved)"),
            ("torch.where(found.total == 0, 0.0,", "torch.where(found.total == 1, 0.0,", ZERO),
            ("(total > 0).double(), torch.nan)", "(total > 0).double(), 0.0)", SEVERAL + " -k finite"),
        ],
    ),
    (
        "lets_kernels/step/step.py",
        SEVERAL,
        [
            ("        self._gathered = self._gathered or", "        self._gathered =", TEN.format("lookbehind")),
            ("        self._earlier.append(self.total)", "        pass"),
            ("        if not self.ascents_left:\n            self._carried.clear()\n", ""),
            ("elif self._norm_at_theta is not None:", "elif False:"),
            ("last=self.ascended + 1 == setting.direction.ascents", "last=True", "tests/around/test_same_rng.py"),
        ],
    ),
    (
        "lets_kernels/step/engine.py",
        SEVERAL,
        [
            ("and step.ascents_left and not step.is_perturbed:", "and step.ascents_left and step.is_perturbed:"),
            ("        if step.ascents_left:\n            return", "        if False:\n            return"),
        ],
    ),
    (
        "lets_kernels/parts/descent.py",
        TEN.format("lookbehind"),
        [
            ("second.numbers(self.alpha, self.alpha)", "second.numbers(self.alpha, 1.0)"),
            ("sums[i] if i in sums else torch.zeros_like(g)", "torch.zeros_like(g)"),
        ],
    ),
    (
        "lets_kernels/parts/descent.py",
        TEN.format("looksam or gsam or penalty or stable"),
        [
            ("a = 1 + self.alpha * _ratio(across, squared)", "a = 1 + self.alpha * across"),
            ("torch.full_like(a, -self.alpha)", "torch.full_like(a, self.alpha)"),
            ("_ratio(torch.ones_like(products[:, 2]), products[:, 2].sqrt())", "products[:, 2].rsqrt() / 2"),
            ("second.numbers(self.alpha, 1 - self.alpha)", "second.numbers(1 - self.alpha, self.alpha)"),
            (
                "_ratio(second.first_squared_norm, second.squared_norm).sqrt()",
                "_ratio(second.first_squared_norm, second.squared_norm)",
            ),
            ("for runs in second.runs], self.alpha)", "for runs in second.runs], 1.0)", TEN.format("wsam")),
            ("-_ratio(across, other)], dim=1", "-_ratio(across, squared)], dim=1"),
            ("_ratio(squared, other).sqrt()", "_ratio(squared, other)"),
        ],
    ),
    (
        "lets_kernels/parts/passes.py",
        TEN.format("wsam"),
        [
            ("others, self.numbers(1.0, -1.0))", "others, self.numbers(-1.0, 1.0))"),
            ("-factor * self.groups[group]", "-1.0 * self.groups[group]"),
            ("-factor * self.groups[group]", "-factor * self.groups[0]", "tests/methods/test_wsam.py"),
            ("            runs.grads = other\n        self._apart", "            pass\n        self._apart"),
            ("part.renew()", "pass", "tests/methods/test_wsam.py"),
            ("pair, gate)\n            part", "pair, gate + 1)\n            part", "tests/methods/test_wsam.py"),
            (
                "self.numbers(1.0, factor)[0]",
                "self.numbers(1.0, 1.0)[0]",
                "tests/learning/test_lets_on_each.py -k 'wsam and finite'",
            ),
        ],
    ),
    (
        "lets_kernels/parts/schedule.py",
        TEN.format("rst or ae or late"),
        [
            ("return moment.uniform() < self.probability", "return moment.uniform() > self.probability"),
            ("(squared - self._mean) ** 2", "squared - self._mean"),
            ("done * self.lambda1 + (1 - done) * self.lambda2", "done * self.lambda2 + (1 - done) * self.lambda1"),
            ("done = (1 - math.cos(math.pi * done)) / 2", "done = 1 - math.cos(math.pi * done) / 2"),
            ("step >= self.steps - self._perturbed", "step < self.steps - self._perturbed"),
            ("round(self.fraction * self.steps)", "int(self.fraction * self.steps)", "tests/methods/test_late.py"),
            ("self._perturbed > 0 and step", "step", "tests/methods/test_late.py"),
            ("return step % self.k == 0", "return step % self.k == 1", TEN.format("looksam")),
        ],
    ),
    (
        "lets_kernels/ops/layouts.py",
        "tests/space/test_layouts.py",
        [
            ("list(map(Tensor.stride, tensors)) != self._strides or ", ""),
            (" or list(map(Tensor.numel, tensors)) != self._numels", ""),
            ("set(map(_dtype, tensors)) != self._dtypes or ", ""),
            (" or set(map(_device, tensors)) != self._devices", ""),
            ("return () if others and any(map(is_fake, tensors)) else", "return"),
            (" or any(map(Tensor.is_neg, grads)) else found", " else found"),
            (" for p in params if p.requires_grad]", " for p in params]"),
            ("same and list(map(_requires_grad, params)) == trained", "same"),
            ("len(state) == len(known) and all(", "all("),
            ("if type(g) is not Tensor:", "if False:"),
            ("compiled is not None and not any(map(is_fake, tensors))", "compiled is not None"),
        ],
    ),
    (
        "lets_kernels/parts/length.py",
        "tests/methods/test_lengths.py",
        [
            ("(rho / norm)", "(rho * norm)"),
            (".clamp(max=self.rho_max)", ""),
            ("(length < self.rho_max).to(length.dtype)", "torch.ones_like(length)"),
            (".nan_to_num(0.0)", ""),
            ("((1 - self.lam) *", "(self.lam *", TEN.format("usam")),
            ("torch.where(torch.isfinite(squared), squared, 0.0)", "squared"),
            ("norm / self._sum.sqrt()", "norm / self._sum", TEN.format("lightsam")),
            ("self.eps**2", "self.eps", TEN.format("lightsam")),
            ('self._sum.fill_(float(state["sum"]))', "pass"),
        ],
    ),
    (
        "lets_kernels/parts/samples.py",
        TEN.format("esam or delta"),
        [
            ("torch.topk((after - before).detach(), count)", "torch.topk((before - after).detach(), count)"),
            ("norms.pow(self.power)", "norms.pow(-self.power)"),
            ("(derivative * outputs).sum()", "outputs.sum()", TEN.format("functional")),
        ],
    ),
    (
        DIRECTION + "base_step.py",
        "tests/methods/test_base_step.py -k 'not reference'",
        [
            ("torch.where(torch.isfinite(first.squared_norm), first.total(shares), torch.nan)", "first.total(shares)"),
            ('not any(first.groups[g]["momentum"] for g in runs.bucket.present)', "True"),
            ('of_g, of_m = (1 - float(group["dampening"]), mu)', "of_g, of_m = (1.0, mu)"),
            ("if begun else (1.0, 0.0)", "if begun else (0.5, 0.0)"),
            ("of_g, of_m = 1 + mu * of_g, mu * of_m", "of_g, of_m = 1 + mu * of_g, of_m"),
            ("return b.parts * b.ops.grad_norm(room", "return 2 * b.ops.grad_norm(room"),
        ],
    ),
    (
        "lets_kernels/base/rehearsal.py",
        "tests/methods/test_base_step.py -k 'not reference'",
        [
            ('options["weight_decay"] = 0.0', "pass"),
            (".div_(-rates[id(own)])", ".div_(rates[id(own)])"),
            ("return float(lr) or 1.0", "return float(lr)"),
            ("_tensor(p, p.dtype in _NARROW)", "_tensor(p, False)"),
            ("with without_global_hooks(), torch.random.fork_rng(devices=sorted(devices)):", "if True:"),
            ('"param_groups", "step", *_HOOKS}', '"param_groups", *_HOOKS}'),
            ("{name: OrderedDict() for name in _HOOKS}", "{name: optimizer.__dict__[name] for name in _HOOKS}"),
            ('by_itself = type(optimizer).__module__.startswith("torch.optim.")', "by_itself = True"),
            ("if row is each[-1] or size >= most:", "if size >= most + 1:"),
            ("doubles.get(id(k), k): _copied", "k: _copied"),
            ("_copied(value, doubles, wide=key.dtype in _NARROW)", "value"),
            ("double.grad = whole_gradient(_tensor(g, True), p)", "double.grad = whole_gradient(g, p)"),
        ],
    ),
    (
        DIRECTION + "momentum.py",
        "tests/methods/test_msam.py -k 'cpu or refused'",
        [
            ("for value in (-1.0, 0.0, 1.0)]", "for value in (1.0, 0.0, 1.0)]"),
            ('"betas": "exp_avg"', '"betas": "exp_avg_sq"'),
            ("if not value:", "if value is None:"),
            ("packed, [], table, None, 0.0, 2.0)", "packed, [], table, None, 0.0, 1.0)"),
            ("runs.only(places)", "runs"),
            ("if not places and any(", "if places and any("),
        ],
    ),
    (
        "lets_kernels/base/state.py",
        "tests/base/test_look.py",
        [
            ("self._state.get(runs.bucket.params[i], {})", "self._state[runs.bucket.params[i]]"),
            ("MappingProxyType(self._state.get(p, {}))", "self._state.get(p, {})"),
            ("[MappingProxyType(dict(group)) for group in self._groups]", "list(self._groups)"),
        ],
    ),
    (
        "lets_kernels/around/randomness.py",
        "tests/methods/test_family_state.py -k 'resumed or seed'",
        [
            ("            self._state[1] += 1", "            pass", TEN.format("random")),
            ('self._state[1] = state["count"]', "pass"),
        ],
    ),
]  # fmt: skip
