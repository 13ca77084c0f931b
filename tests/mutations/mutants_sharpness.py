"""Mutations of what measures sharpness, killed by known answers; see mutants_table.py."""

ROOM = "lets_kernels/sharpness/"
TESTS = "tests/sharpness/test_{}.py"

GROUPS = [
    (
        ROOM + "ball.py",
        TESTS.format("ball"),
        [
            ("epsilon = scale * ball.towards", "epsilon = ball.towards"),
            ("scale * gradient, ball.rho)", "gradient, ball.rho)"),
            ("if finite(loss) > worst:", "if True:"),
            ("u = ball.towards(u, scale * gradient,", "u = ball.towards(u, gradient,"),
            ("return sum(share * value", "return sum(value"),
            ("theta.abs() + self._xi", "theta.abs()"),
            ("return u * (self.rho / reached) if reached > self.rho else u", "return u"),
            ("u + length * gradient.sign()", "u + length * gradient"),
            (".clamp(-self.rho, self.rho)", ""),
        ],
    ),
    (
        ROOM + "hessian.py",
        TESTS.format("hessian"),
        [
            ("errors[-k:] <= tolerance * values.abs().max()).all())\n\n", "errors[-k:] <= 1e9).all())\n\n"),
            ("float(found.std()) / math.sqrt(samples)", "float(found.std())"),
            ("vectors[0].square() / runs", "vectors[0].abs() / runs"),
            ("return (2 * drawn - 1)", "return (2 * drawn - 0.9)"),
            ("    for _ in range(2):\n", "    for _ in range(0):\n"),
            ("if exhausted:\n", "if False:\n"),
            ("/ (width * math.sqrt(2 * math.pi))", "/ width"),
        ],
    ),
    (
        ROOM + "landscape.py",
        TESTS.format("landscape"),
        [
            ("d * norms[0] / norms[1]", "d / norms[1]"),
            ("1 if id(p) in turned else 0", "0"),
            ("a * d + b * e) for a in places] for b in places", "b * d + a * e) for a in places] for b in places"),
        ],
    ),
    (
        ROOM + "objective.py",
        TESTS.format("objective"),
        [
            ("[n / sum(sizes) for n in sizes]", "[1 / len(sizes) for n in sizes]"),
            ("        self._snapshot.replay()\n", "        pass\n"),
            ("                p.copy_(w if step is None else w + step)\n        forget_casts()\n",
             "                p.copy_(w if step is None else w + step)\n"),
            ("self.model.train(self._train)", "self.model.train()"),
            ("sdpa_kernel(SDPBackend.MATH)", "nullcontext()", TESTS.format("hessian")),
        ],
    ),
    (
        ROOM + "snapshot.py",
        TESTS.format("objective"),
        [
            ("            module.training = training\n", "            pass\n"),
            ("                buffer.copy_(copy)\n", "                pass\n"),
            ("            at.end()\n            raise\n", "            raise\n"),
            ("        random.setstate(self._python)\n", "        pass\n"),
        ],
    ),
]  # fmt: skip
