"""The mutations of `make mutants`: one file's text, what takes its place, and the tests of which one must go red.

Each text stands exactly once in its file. A mutation says something wrong, and runs: one that fails to import proves
nothing, and one that computes the same is none.
"""

from typing import NamedTuple

import mutants_experiment
import mutants_foreach
import mutants_groups
import mutants_kernels
import mutants_parts
import mutants_radii
import mutants_reference
import mutants_sharpness


class Mutant(NamedTuple):
    file: str
    text: str
    replacement: str
    tests: str  # what pytest gets

    @property
    def compiled(self):
        return self.file.startswith("csrc/")


RESTORING = "            try:\n                a.bucket.restore(a.runs)\n            except"
FILES = "tests/learning/test_hypergradient.py tests/methods/test_methods.py"
LEARNED = f"{FILES} -k 'reference and (rounding or lets and secant)'"
DIRECTED = "tests/methods/test_methods.py -k 'reference and (every_method or diagonal and lets_takes)'"

#: file, tests, and pairs of text and replacement; a pair may have tests of its own.
GROUPS = [
    *mutants_reference.GROUPS,
    *mutants_foreach.GROUPS,
    *mutants_groups.GROUPS,
    *mutants_kernels.GROUPS,
    *mutants_parts.GROUPS,
    *mutants_radii.GROUPS,
    *mutants_sharpness.GROUPS,
    *mutants_experiment.GROUPS,
    ("lets_kernels/ops/native.py", "tests/ops/test_packed.py", [("packed.tensors = tensors", "packed.tensors = []")]),
    (
        "lets_kernels/learning/hypergradient.py",
        "tests/learning/test_hypergradient.py -k 'reference and rounding'",
        [
            ("-self.lr[group] * bucket.parts * share", "self.lr[group] * bucket.parts * share"),
            ("-self.lr[group] * self.slope * length * share)", "-self.slope * length * share)"),
            ("-self.lr[group] * self.slope * length * share)", "-self.lr[group] * self.slope * share)"),
            ("near.pow((a.q - 1) / a.q)", "near.pow(1 / a.q)", "tests/methods/test_methods.py -k every_direction"),
            ("a.total(saved=True)", "a.total()"),
            (
                "replace(a, runs=replace(a.runs, grads=[]), vectors=vectors)",
                "replace(a, vectors=vectors)",
                "tests/methods/test_catalogue.py -k 'learned_radius and algorithm1'",
            ),
            (
                "for source in (stepped, first))",
                "for source in (self.perturbed[k], first))",
                "tests/methods/test_parts.py",
            ),
            (
                "own(self.perturbed), stepped=own(self.stepped)",
                "self.perturbed, stepped=self.stepped",
                "tests/step/test_hazards.py",
            ),
        ],
    ),
    (
        "lets_kernels/parts/direction/gradient.py",
        DIRECTED,
        [
            ("else p / (p - 1)", "else p"),
            (
                'bias = p.dim() <= 1 if name is None else "weight" not in name',
                "bias = p.dim() <= 1",
                "tests/step/test_contract.py -k bias",
            ),
            ("if not self.filterwise or p.dim() < 3", "if not self.filterwise or p.dim() < 2"),
        ],
    ),
    (
        "lets_kernels/parts/direction/base.py",
        DIRECTED,
        [
            ("return [self.bucket.saved] if saved else self.runs.weights", "return self.runs.weights"),
            ("return 1 if id(p) in self._transposed else 0", "return 0"),
        ],
    ),
    (
        "lets_kernels/parts/part.py",
        "tests/step/test_errors.py",
        [
            ("math.isfinite(value) and value >= 0", "value >= 0"),
        ],
    ),
    (
        "lets_kernels/learning/learned.py",
        LEARNED,
        [
            ("losses[0] - losses[1] if self.metric", "losses[1] - losses[0] if self.metric"),
            ("[weight * s for s in means", "[s for s in means"),
            (".all() * trial.gate", ".all()", "tests/step/test_finite.py -k 'reference and learned'"),
            (
                "torch.isfinite(torch.stack(gradients)).all() * trial.gate",
                "trial.gate",
                "tests/step/test_finite.py -k 'reference and learned'",
            ),
            ("(step + 1) % self.interval == 0", "step % self.interval == 0"),
            ('if self.metric == "validation_loss":', "if False:"),
            ("sums = [v - t for v, t in", "sums = [v + t for v, t in"),
            ("            trial = trial.along(train.gradients, replicas)", "            pass"),
            (
                "return val if self.goes_along_train and self.reuse_train_gradient else",
                "return val if self.goes_along_train else",
            ),
            (
                "if isinstance(observed, Summed) and len(observed.sums) != len(self.nu):",
                "if False:",
                "tests/learning/test_following.py -k was_added",
            ),
            ("d / nu.detach().exp() for d", "d for d"),
            ("trial.detached(), val", "trial, val", "tests/step/test_hazards.py"),
        ],
    ),
    (
        "lets_kernels/step/step.py",
        "tests/step/test_finite.py -k reference",
        [
            ("flags = [*known, *means[:1], *self._earlier, *self.totals]", "flags = [*known, *self.totals]"),
            ("flags = [*known, *means[:1], *self._earlier, *self.totals]", "flags = [*known, *means[:1]]"),
            ("else self.x.pow(1 / self.q)", "else self.x.sqrt()", "tests/methods/test_parts.py"),
            (
                "torch.stack(self.totals).mean(), q)",
                "torch.stack(self.totals).mean(), 2.0)",
                "tests/step/test_micro.py -k power_mean",
            ),
            (RESTORING, "            try:\n                pass\n            except"),
            ("if self.is_perturbed and second[a.runs.bucket.index].indices != a.runs.indices:", "if False:"),
        ],
    ),
    (
        "lets_kernels/step/engine.py",
        "tests/step/test_faults.py -k reference",
        [
            ("(step is not None and step.torn) or", "False or"),
        ],
    ),
    (
        "lets_kernels/step/engine.py",
        "tests/step/test_hazards.py tests/step/test_contract.py -k 'not cpu'",
        [
            (
                "any(getattr(g, _SEEN, None) != now for g, now in zip(marked, versions(marked), strict=True))",
                "bool(marked)",
            ),
        ],
    ),
    (
        "lets_kernels/step/closures.py",
        "tests/step/test_convention.py -k 'not cpu'",
        [
            ("zeroed = self._zeroed or self._engine", "zeroed = self._engine"),
            ("elif not self._reached[i] and not self._holds_gradient(i):", "elif False:"),
            ("any(g is None or not g.requires_grad for g in self._replaced)", "bool(self._replaced)"),
            ("(is_spread(zero) or bool(zero.any()))", "False"),
            ("return bool(seen and not torch.signbit(zero.flatten()[0]))", "return False"),
        ],
    ),
    (
        "lets_kernels/step/convention.py",
        "tests/step/test_convention.py -k 'not cpu'",
        [
            ("return Guess.LIKELY_CALLER if undone else Guess.OPEN", "return Guess.LIKELY_CALLER"),
            ("if setting.direction.starts or not are_new():", "if not are_new():"),
            ("return self._caller is None and not nothing", "return self._caller is None"),
            ("            if not nothing:", "            if True:"),
            ("else Guess.KNOWN_CALLER", "else Guess.CALLER"),
        ],
    ),
    (
        "lets_kernels/base/saved.py",
        "tests/state/test_damaged_base.py",
        [
            ("    wrong = _tried_out(trial)", "    wrong = None"),
            ("if id(value) in seen:", "if False:"),
            ("if entry.get(name) is None:", "if False:"),
        ],
    ),
    (
        "lets_kernels/checks.py",
        "tests/state/test_damaged_base.py",
        [
            ("value.layout is not torch.strided", "False"),
        ],
    ),
    (
        "lets_kernels/space/buckets.py",
        "tests/space/test_moved.py -k 'reference and resized'",
        [
            ("for i in (i for i in runs.indices if i not in resized):", "for i in (() if resized else runs.indices):"),
        ],
    ),
    (
        "lets_kernels/step/closures.py",
        "tests/step/test_convention.py -k 'not cpu'",
        [
            ("    if zeroed:\n        _begin_again(e, scaler)", "    if False:\n        _begin_again(e, scaler)"),
            ("    e.work.progress.gradients += 1", "    pass"),
            ("        watch.give_back()", "        pass"),
            ("    e.work.setting.network.statistics.hold()", "    pass"),
            ("        e.forget_pass()\n        e.work.scaling.give_up()", "        e.work.scaling.give_up()"),
        ],
    ),
    (
        "lets_kernels/step/engine.py",
        "tests/base/test_bases.py -k reference",
        [
            ("            if now.radius_waits or now.lesson is not None:", "            if False:"),
        ],
    ),
    (
        "lets_kernels/sam.py",
        "tests/base/test_bases.py -k reference",
        [
            ("setting.network.check_holds(self._engine.work.params())", "pass"),
        ],
    ),
    (
        "lets_kernels/space/distributed.py",
        "tests/base/test_bases.py -k refused",
        [
            ("if frame.f_code.co_filename == zero.__file__:", "if False:"),
        ],
    ),
    (
        "lets_kernels/base/foreign.py",
        "tests/base/test_bases.py -k reference",
        [
            ("        for each in hooks:\n            each.clear()", "        pass"),
            ("    if lacks:", "    if False:"),
        ],
    ),
    (
        "lets_kernels/base/guarded.py",
        "tests/base/test_guarded.py",
        [
            ("if gate.item() != 0:", "if True:"),
            ("torch.where(closed[t.device], old, t)", "t"),
        ],
    ),
    (
        "lets_kernels/space/distributed.py",
        "tests/distributed/test_distributed.py",
        [
            ("return reduced / count", "return reduced"),
            ("dist.all_reduce(reduced, group=group)", "pass"),
        ],
    ),
    (
        "lets_kernels/trajectory/loss.py",
        "tests/methods/test_trajectory.py -k 'loss or gradients or extreme or float32'",
        [
            ("kl_div(log_now, log_past,", "kl_div(log_past, log_now,"),
            (".clamp(min=torch.finfo(outputs.dtype).min)", ""),
            ("centred(outputs) / temperature", "outputs / temperature"),
            ("past = past.detach()", "past = past"),
            ("terms.sum() / max(len(terms), 1)", "terms.mean()"),
            ("temperature**2 if", "temperature if"),
        ],
    ),
    (
        "lets_kernels/trajectory/saf.py",
        "tests/methods/test_trajectory.py -k 'records or recorded or resuming or term'",
        [
            ("epoch - self.epochs, index, outputs.device", "epoch - self.epochs + 1, index, outputs.device"),
            (".index_select(0, index) == epoch", ".index_select(0, index) >= 0"),
            ("epoch >= max(self.start, self.epochs)", "epoch >= self.epochs"),
            ("kept.isnan().any(1)", "kept.isnan().all(1)"),
            ("if record and", "if"),
            ('"epoch": self._epoch,', '"epoch": 0,'),
        ],
    ),
    (
        "lets_kernels/trajectory/mesa.py",
        "tests/methods/test_trajectory.py -k mesa",
        [
            ("get_ema_multi_avg_fn(decay)", "get_ema_multi_avg_fn(0.5)"),
            (", use_buffers=True).eval()", ").eval()"),
            ("use_buffers=True).eval()", "use_buffers=True)"),
        ],
    ),
]

MUTANTS = [
    Mutant(file, text, replacement, own[0] if own else tests)
    for file, tests, pairs in GROUPS
    for text, replacement, *own in pairs
]
