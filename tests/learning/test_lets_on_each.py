"""LETS on every method: the gradient in the radius against finite differences of the objective.

Two losses make the two curvatures exact. Where the loss is -Σ log(c - θ) its Hessian is diag(g²) everywhere, so the
diagonal, taken at the perturbed weights along the perturbation that was applied, is the derivative itself, at any ρ.
Where the loss is quadratic, H ε = ĝ - g, so the secant is. What is left is the error of the finite difference, unless a
method steps along something that is not linear in ĝ, or takes its first gradient elsewhere; those are listed with what
they are off by.
"""

import math

import pytest
import torch

import lets_kernels as lk
from lets_kernels.methods import catalogue
from lets_kernels.parts.passes import DRAWS
from support.inside import progress, work

SGD = torch.optim.SGD
RHO, LR, WARM = 0.05, 0.3, 3
H = 1e-5  # of the central difference: its error is O(H²) of a smooth function, and 1e-16/H of rounding
EXACT = 1e-6
WARNED = math.inf  # nothing is promised, and a warning says so
SHAPES = ((3, 4), (5,), (2, 2, 2))


def sam(**parts):
    return lambda params, rho, **k: lk.SAM(params, SGD, rho, lr=LR, **parts, **k)


def method(cls, **options):
    return lambda params, rho, **k: cls(params, SGD, rho, lr=LR, **options, **k)


# name: (constructor, error of the diagonal, error of the secant); None: refused, and the reason
METHODS = {
    "sam": (sam(), EXACT, EXACT),
    "p=1": (sam(direction=lk.Gradient(p=1)), EXACT, EXACT),
    "p=1.5": (sam(direction=lk.Gradient(p=1.5)), EXACT, EXACT),
    "p=1.05": (sam(direction=lk.Gradient(p=1.05)), EXACT, EXACT),
    "p=inf": (sam(direction=lk.Gradient(p=math.inf)), EXACT, EXACT),
    "asam": (method(lk.ASAM, xi=0.1), EXACT, EXACT),
    "asam-filterwise": (method(lk.ASAM, xi=0.1, filterwise=True), EXACT, EXACT),
    "rst": (method(lk.RST, p=1.0), EXACT, EXACT),
    "looksam": (method(lk.LookSAM, k=WARM), EXACT, EXACT),
    "ae-sam": (method(lk.AESAM, steps=10, lambda1=-9.0, lambda2=-9.0), EXACT, EXACT),
    "ae-looksam": (method(lk.AELookSAM, steps=10, lambda1=-9.0, lambda2=-9.0), EXACT, EXACT),
    "late-sam": (method(lk.LateSAM, steps=WARM + 1, fraction=0.5), EXACT, EXACT),
    "fisher": (method(lk.FisherSAM, eta=2.0), EXACT, EXACT),
    "sparse": (method(lk.SparseSAM, sparsity=0.6), EXACT, EXACT),
    "sparse-dynamic": (method(lk.SparseSAM, kind="dynamic", interval=2, steps=9), EXACT, EXACT),
    "friendly": (method(lk.FriendlySAM, sigma=0.7), EXACT, EXACT),
    "friendly-update-first": (method(lk.FriendlySAM, sigma=0.7, update_first=True), EXACT, EXACT),
    "friendly-adaptive": (method(lk.FriendlySAM, sigma=0.7, adaptive=True), EXACT, EXACT),
    "vasso": (method(lk.VaSSO, theta=0.4), EXACT, EXACT),
    "le-sam": (method(lk.LESAM, rho_max=1.0), EXACT, EXACT),
    "usam": (method(lk.USAM, lam=0.3), EXACT, EXACT),
    "lightsam": (method(lk.LightSAM), EXACT, EXACT),
    "esam": (method(lk.ESAM, beta=0.6), EXACT, WARNED),
    "esam-tensor": (method(lk.ESAM, beta=0.8, granularity="tensor", gamma=1.0), EXACT, EXACT),
    "delta": (method(lk.DeltaSAM), EXACT, WARNED),
    "penalty": (method(lk.GradientNormPenalty, alpha=0.7), EXACT, EXACT),
    # Where later ascents go depends on ρ, and is taken as it is; Lookbehind's first gradients depend on it, too.
    "multi-step": (method(lk.MultiStepSAM, k=3), 0.003, 0.02),
    "multi-step-growing": (method(lk.MultiStepSAM, k=3, renormalize=False), 0.005, 0.03),
    "lookbehind": (method(lk.Lookbehind, k=2), 0.5, 0.01),
    "sampa": (method(lk.SAMPa), EXACT, WARNED),
    "wsam": (method(lk.WSAM, gamma=0.6), EXACT, EXACT),
    "wsam-coupled": (method(lk.WSAM, gamma=0.6, decouple=False), EXACT, EXACT),
    "random": (method(lk.RandomSAM), EXACT, None),
    "msam": (method(lk.MSAM, momentum=0.9), EXACT, None),
    # Whose step is -lr m/s: with m = ĝ and a precision that stays at one it is what the derivation takes it for.
    "bsam": (
        lambda params, rho, **k: lk.BSAM(
            params, rho, lr=LR, data_size=math.inf, beta1=0.0, beta2=1.0, weight_decay=0.0, **k
        ),
        EXACT,
        EXACT,
    ),
    # The gradient that is stepped along is not linear in ĝ.
    "gsam": (method(lk.GSAM, alpha=0.4), 0.5, 0.1),
    "stable-sam": (method(lk.StableSAM), 0.7, 0.1),
    # The first gradient is not that at θ: the secant takes the way there for a part of ε.
    "r-sam": (method(lk.RSAM, gamma=1e-2), EXACT, WARNED),
    "r-gsam": (method(lk.RGSAM, gamma=1e-2), 0.5, WARNED),
}


class Problem:
    """A training and a validation loss with Hessian diag(g²), or quadratic ones, and their closures under a method."""

    def __init__(self, kind, make, rho):
        generator = torch.Generator().manual_seed(3)

        def draw(low, high):
            return [torch.rand(s, generator=generator, dtype=torch.float64) * (high - low) + low for s in SHAPES]

        self.kind = kind
        self.params = [torch.nn.Parameter(x) for x in draw(-0.5, 0.5)]
        self.far = {name: draw(2.0, 4.0) for name in ("train", "val")}
        self.steep = {name: draw(0.5, 2.0) for name in ("train", "val")}
        self.unlike = torch.tensor([-0.6, 0.1, 0.2, 0.3], dtype=torch.float64) * (
            kind == "quadratic"
        )  # they sum up to zero
        self.opt = make(self.params, rho, seed=5)

    def loss(self, name):
        far, steep = self.far[name], self.steep[name]
        if self.kind == "logarithm":
            return -sum((c - p).log().sum() for c, p in zip(far, self.params, strict=True))
        return sum((s * (p - c).square()).sum() for s, c, p in zip(steep, far, self.params, strict=True)) / 2

    def closure(self, name):
        def run(subset=None):
            if self.opt.samples.per_sample:
                # The diagonal is exact only where all samples are alike. In the quadratic problem they are not: then
                # the first or the second gradient is that of another loss than the other, which is what is tested.
                steep = 1 + 2 * self.unlike.abs()  # the norm of each sample's gradient in the outputs
                outputs = self.loss(name).expand(4) * (1 + self.unlike * self.params[0].sum()) / steep
                rows = slice(None) if subset is None else subset
                outputs = outputs[rows]
                return outputs * steep[rows], outputs
            self.opt.zero_grad()
            loss = self.loss(name)
            loss.backward()
            return loss

        return run

    def step(self):
        closures = (self.closure("train"), self.closure("val")) if self.opt.radius.learns else (self.closure("train"),)
        self.opt.step(*closures)

    def objective(self):
        with torch.no_grad():
            return float((self.loss("val") - self.loss("train")).square() / 2)


def finite_difference(kind, make):
    """dF/dρ of the last step's radius, all steps before it taken with the same one."""
    values = []
    for rho in (RHO + H, RHO - H):
        problem = Problem(kind, make, lk.ScheduledRadius(lambda t, rho=rho: RHO if t < WARM else rho))
        for _ in range(WARM + 1):
            problem.step()
        values.append(problem.objective())
    return (values[0] - values[1]) / (2 * H)


def learned(kind, make, curvature):
    # lr 0: the radius stays where it is, and its gradient is reported all the same
    problem = Problem(kind, make, lk.LearnedRadius(RHO, curvature=curvature, optimizer=SGD, lr=0.0))
    for _ in range(WARM + 1):
        problem.step()
    assert float(problem.opt.rho) == pytest.approx(RHO, rel=1e-12)
    return float(problem.opt.metrics()["rho_grad"])


CURVATURES = {"diagonal": ("logarithm", 1), "secant": ("quadratic", 2)}
CASES = [(name, c) for name, row in METHODS.items() for c, (_, place) in CURVATURES.items() if row[place] is not None]


@pytest.mark.parametrize("name, curvature", CASES)
def test_the_gradient_in_the_radius_is_that_of_finite_differences(name, curvature):
    make, kind, bound = METHODS[name][0], CURVATURES[curvature][0], METHODS[name][CURVATURES[curvature][1]]
    exact = finite_difference(kind, make)
    if bound == WARNED:
        with pytest.warns(lk.CurvatureWarning, match="differ in more than that"):
            found = learned(kind, make, curvature)
        assert abs(found - exact) > 0.01 * abs(exact)  # ten thousand times what is exact
        return
    found = learned(kind, make, curvature)
    assert abs(exact) > 1e-4  # else the rounding of the difference, 1e-11, is no longer small beside the bound
    assert abs(found - exact) <= bound * abs(exact), f"{found / exact - 1:.3g} off"
    if bound > EXACT:
        assert abs(found - exact) > 1e-4 * abs(exact), "better than its row says"


@pytest.mark.parametrize("name", ["r-sam", "r-gsam", "bsam-sampled", "delta"])
def test_a_first_gradient_of_another_loss_or_place_is_not_reused(name):
    sampled = lambda params, rho, **k: lk.BSAM(params, rho, lr=LR, data_size=100, **k)  # noqa: E731
    make = sampled if name == "bsam-sampled" else METHODS[name][0]
    with pytest.raises(ValueError, match="leave it out"):
        Problem("quadratic", make, lk.LearnedRadius(RHO, reuse_train_gradient=True))


def test_every_second_perturbed_step_is_learned_from_where_not_all_are_perturbed():
    """LookSAM perturbs steps 0, 2, 4 ...: counted among all steps, every second one would never be one of them."""
    problem = Problem("logarithm", METHODS["sam"][0], 0.1)
    radius = lk.LearnedRadius(RHO, interval=2, optimizer=SGD, lr=1.0)
    problem.opt, seen = lk.LookSAM(problem.params, SGD, radius, k=2, lr=LR), []
    for _ in range(8):
        problem.step()
        seen.append(float(problem.opt.rho))
    learned = [after != pytest.approx(before, rel=1e-12) for before, after in zip([RHO, *seen], seen, strict=False)]
    assert learned == [step in (2, 6) for step in range(8)]


def test_every_method_is_here():
    """A learned radius goes with each, as docs/methods.md says."""
    params = [torch.nn.Parameter(torch.ones(3))]
    tried = {type(make(params, RHO)) for make, *_ in METHODS.values()}
    presets = {lk.LETSSAM, lk.LETSASAM}  # SAM and ASAM with a learned radius
    assert tried | presets == {m.cls for m in catalogue.methods()}


def test_a_direction_without_a_first_gradient_has_no_secant():
    for options in ({"curvature": "secant"}, {"reuse_train_gradient": True}):
        with pytest.raises(ValueError, match="takes none"):
            lk.RandomSAM([torch.nn.Parameter(torch.ones(3))], SGD, lk.LearnedRadius(0.1, **options), lr=0.1)


def unit(vectors, scales, q):
    """T sign(Tv)|Tv|^(q-1) / (Σ|Tv|^q)^(1/p), over all tensors together."""
    scaled = [t * v for t, v in zip(scales, vectors, strict=True)]
    total = sum(x.abs().pow(q).sum() for x in scaled)
    return [t * x.sign() * x.abs().pow(q - 1) / total ** ((q - 1) / q) for t, x in zip(scales, scaled, strict=True)]


def scales_of(name, weights, along):
    """T at θ_t, where a method has one; the Fisher information is that of the vector itself."""
    if name == "fisher":
        return [(1 + 2.0 * v * v) ** -0.5 for v in along]
    if name.startswith("asam"):
        wise = name == "asam-filterwise"
        filters = [x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1)) if x.dim() > 2 else None for x in weights]
        return [x.abs() + 0.1 if f is None or not wise else f + 0.1 for x, f in zip(weights, filters, strict=True)]
    if name == "friendly-adaptive":
        return [x.abs() for x in weights]
    return [torch.ones_like(v) for v in along]


LENGTHS = ("le-sam", "usam", "lightsam")


@pytest.mark.parametrize("name", METHODS)
def test_along_the_training_gradient_as_algorithm_1_prints_it(name):
    """ε̂ is then the direction of ḡ_tr, whatever the method perturbed along, over the tensors that were perturbed."""
    learned = lk.LearnedRadius(RHO, direction="algorithm1", optimizer=SGD, lr=0.0)
    problem = Problem("logarithm", METHODS[name][0], learned)
    for _ in range(WARM):
        problem.step()
    weights = [p.detach().clone() for p in problem.params]
    seen = []
    call = work(problem.opt).call

    def recording(closure, scaler=None):
        result = call(closure, scaler)
        seen.append([p.grad.clone() for p in problem.params])
        return result

    work(problem.opt).call = recording
    problem.step()
    hat, train, val = seen[-3:]
    q = {"p=1.5": 3.0, "p=1.05": 21.0, "p=inf": 1.0}.get(name, 2.0)
    if name == "esam-tensor":
        drawn = progress(problem.opt).random.uniforms(WARM, len(SHAPES), DRAWS)
        chosen = [i for i, draw in enumerate(drawn) if draw < 0.8]
        assert 0 < len(chosen) < len(SHAPES)
        hat, train, val = ([each[i] for i in chosen] for each in (hat, train, val))
    directions = unit(train, scales_of(name, weights, train), q)
    with torch.no_grad():
        gap = problem.loss("val") - problem.loss("train")
    terms = zip(val, train, hat, directions, strict=True)
    slope = {"penalty": 0.7, "wsam": 1.5, "wsam-coupled": 1.5, "lookbehind": 0.5, "sampa": 0.8}.get(name, 1.0)
    expected = -LR * slope * gap * sum(((v - t) * h * h * d).sum() for v, t, h, d in terms)
    if name in LENGTHS:  # ε has another length than ρ: that of the step
        expected *= problem.opt.metrics()["applied_rho"] / RHO
    torch.testing.assert_close(problem.opt.metrics()["rho_grad"], expected, rtol=1e-12, atol=0)
