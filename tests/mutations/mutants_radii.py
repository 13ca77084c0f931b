"""Mutations of the radii that move by themselves, killed by their transcriptions; see mutants_table.py."""

TWENTY = "tests/learning/test_auto.py -k 'reference and twenty_steps and formula and (momentum or sgd)'"
FOLLOWING = "tests/learning/test_following.py -k 'not cpu'"
WARMUP = "tests/learning/test_following.py -k 'rises or resumed or does_not_perturb or groups_rise'"

GROUPS = [
    (
        "lets_kernels/learning/auto.py",
        TWENTY,
        [
            ("perturbed - 2 * across + first", "perturbed - across"),
            ("(squared / first).log().div(2)", "(squared / first).log()"),
            ("(squared / first).log().div(2)", "(squared / perturbed).log().div(2)"),
            ("torch.maximum(perturbed, first)", "torch.minimum(perturbed, first)"),
            ("torch.where(t == 0, log_kappa - nu,", "torch.where(t < 0, log_kappa - nu,"),
            ("(1 - c.length_decay) * (log_kappa - nu)", "(1 - c.length_decay) * log_kappa"),
            ("torch.where(highest > 0, lr / highest, 0.0)", "torch.where(highest > 0, lr, 0.0)"),
            ("highest, starts = torch.maximum(highest, lr)", "highest, starts = lr"),
            ("weight = kept * weight + (1 - kept)", "weight = torch.ones_like(weight)"),
            ("-forward / (first * moved).sqrt()", "forward / (first * moved).sqrt()"),
            ("-forward / (first * moved).sqrt()", "-forward / (perturbed * moved).sqrt()"),
            ("headway.clamp(max=c.most_headway)", "headway", "tests/learning/test_auto.py -k never_overshoots"),
            ("torch.minimum(aimed - nu, ", "torch.maximum(aimed - nu, "),
            (".clamp(-c.bound, c.bound)", ""),
            (".clamp(-c.start_bound, c.start_bound)", ""),
            ("- log_kappa) / (1 + t)", "- log_kappa) / (2 + t)"),
            ("torch.where(starts, found, c.rate * up)", "torch.where(starts, found, up)"),
            (
                "torch.where((moved > 0) & ~starts, kept, 1.0)",
                "torch.where(~starts, kept, 1.0)",
                "tests/learning/test_auto.py -k sums",
            ),
            ("torch.where((moved > 0) & ~starts, kept, 1.0)", "torch.where(moved > 0, kept, 1.0)"),
            (
                "torch.isfinite(new).all(dim=1, keepdim=True) & (gate != 0)",
                "(gate != 0)",
                "tests/learning/test_auto.py -k skipped",
            ),
            ("math.log(_LEAST), math.log(_MOST)", "-99.0, 99.0", "tests/learning/test_auto.py -k bend"),
        ],
    ),
    (
        "lets_kernels/learning/moving.py",
        "tests/learning/test_auto.py -k a_radius_a_group",
        [
            ("self._log(index if self.per_group else 0)", "self._log(0)"),
            ("k = index if self.per_group else 0", "k = 0"),
            ("radii[index if self.per_group else 0]", "radii[0]"),
        ],
    ),
    (
        "lets_kernels/parts/passes.py",
        TWENTY,
        [
            ("b.parts * found[1:]", "b.parts * found[:2]"),
            (
                "by_group[line] += b.parts * found[1:]",
                "by_group[0] += b.parts * found[1:]",
                "tests/learning/test_auto.py -k a_radius_a_group",
            ),
            (
                "view.copy_(local(own[name]) if name in own else begin)",
                "view.copy_(begin)",
                "tests/state/test_state.py -k 'auto and momentum and cpu and file'",
            ),
        ],
    ),
    (
        "lets_kernels/parts/direction/base.py",
        "tests/learning/test_auto.py -k 'reference and (formula or norm)'",
        [
            ("r.grads and self.q == 2 and not (self.scaled and b.scaled)", "r.grads and self.q == 2"),
            ("r.grads and self.q == 2 and not", "r.grads and not"),
        ],
    ),
    (
        "lets_kernels/learning/learned.py",
        FOLLOWING,
        [
            ("if observed is None:  # this", "if observed is not None:  # this"),
        ],
    ),
    (
        "lets_kernels/step/setting.py",
        WARMUP,
        [("(step + 1) / self.rho_warmup", "step / self.rho_warmup")],
    ),
    (
        "lets_kernels/step/engine.py",
        "tests/learning/test_following.py -k says_so_once",
        [("if now.missed == _MISSED:", "if now.missed >= _MISSED:")],
    ),
    (
        "lets_kernels/step/step.py",
        WARMUP,
        [
            ("setting.rho_share(progress.step) if", "setting.rho_share(progress.perturbed_steps) if"),
            ("rho if share == 1 else rho * share", "rho"),
        ],
    ),
    (
        "lets_kernels/step/learn.py",
        "tests/learning/test_following.py -k may_pause",
        [
            (
                "now.radius_waits, now.missed = now.lesson, None, False, None",
                "now.radius_waits = now.lesson, None, False",
            ),
            (
                "_observed(buckets, train_loss, radius.goes_along_train)",
                "(found := _observed(buckets, train_loss, True))",
                "tests/methods/test_catalogue.py -k 'peak_of_a_step and LETS'",
            ),
        ],
    ),
    (
        "lets_kernels/learning/saved.py",
        "tests/learning/test_following.py -k sums_that_wait",
        [
            ('if val["curvature"] != curvature:', "if False:"),
            ("1 <= len(sums) <= count", "len(sums) <= count"),
            ("1 <= len(sums) <= count", "1 <= len(sums)"),
        ],
    ),
]
