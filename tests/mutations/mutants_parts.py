"""Mutations of the parts of the other methods, killed by the transcriptions of the papers; see mutants_table.py."""

DIRECTION = "lets_kernels/parts/direction/"
ROBUST = "tests/methods/test_family_robust.py -k 'cpu and not_finite'"
ZERO = "tests/methods/test_family_robust.py -k 'cpu and zero'"
SAMPA = "tests/methods/test_sampa.py"
SEVERAL = "tests/methods/test_multistep.py"
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
            ("self._norm() if self._norm_at_theta is None else self._norm_at_theta", "self._norm()"),
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
            ("if {(t.dtype, t.device) for t in tensors} != self._kinds:", "if False:"),
            ("return () if any(map(is_fake, tensors)) else", "return"),
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
