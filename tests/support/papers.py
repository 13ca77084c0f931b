"""The methods of the family as their papers print them, in float64, on dictionaries of weights.

Nothing is taken from `lets_kernels` but the source of random numbers. Draws belong to an element's place in memory: the
parameters of a group one after the other, each from the next multiple of sixteen.
"""

import math

import torch
from torch import nn
from torch.func import functional_call

from lets_kernels.around.randomness import Randomness
from lets_kernels.ops.reference.noise import normals, words
from support import oracle
from support.oracle import dot

NOISE, DRAWS, REGROWTH = range(3)


class Run:
    """Ten steps of a method: its weights, its batches, its base optimizer, and what it carries from step to step."""

    def __init__(self, net, theta, batches, base, seed):
        self.net, self.theta, self.batches, self.base, self.seed = net, theta, batches, base, seed
        self.strides = {k: x.stride() for k, x in theta.items()}
        self.held = {}  # by name, a dictionary of tensors each
        self.perturbed = []  # whether each step was

    def steps(self):
        yield from enumerate(batch for batch, _ in self.batches)

    def outputs(self, theta, batch):
        return functional_call(self.net, theta, batch[0])

    def losses(self, theta, batch):
        return nn.functional.cross_entropy(self.outputs(theta, batch), batch[1], reduction="none")

    def grad(self, batch, at=None, weights=None):
        """The gradient of the mean loss (or of the weighted sum of losses), at theta or at other weights."""

        def loss(theta, batch):
            found = self.losses(theta, batch)
            return found.mean() if weights is None else (weights * found).sum()

        return oracle.gradient(loss, self.theta if at is None else at, batch)[1]

    def moved(self, rho, eps):
        """theta + rho eps; rho may be a dictionary too, where groups have their own."""
        radii = rho if isinstance(rho, dict) else dict.fromkeys(eps, rho)
        return {k: x + radii[k] * eps[k] for k, x in self.theta.items()}

    def descend(self, d, perturbed=True):
        self.theta = self.base.step(self.theta, d)
        self.perturbed.append(perturbed)

    def draw(self, function, t, stream):
        """Normal numbers or words for every element, in float64 (a word has 32 bits)."""
        place, found = torch.tensor([self.seed, t]), {}
        start = 0
        for k, x in self.theta.items():
            drawn = function(start, x.numel(), place, stream)
            found[k] = drawn.as_strided(x.shape, self.strides[k]).double()
            start += (x.numel() + 15) // 16 * 16
        return found

    def uniform(self, t):
        return Randomness(self.seed, True).uniform(t, 0)


def lin(*terms):
    """Σ a x over dictionaries."""
    return {k: sum(a * x[k] for a, x in terms) for k in terms[0][1]}


def unit(g):
    return lin((1 / math.sqrt(dot(g, g)), g)) if dot(g, g) > 0 else lin((0.0, g))


def scaled_unit(v, theta):
    """T^2 v/||Tv|| with T = |theta|; the unit vector along v without theta."""
    if theta is None:
        return unit(v)
    scaled = {k: theta[k].abs() * x for k, x in v.items()}
    return {k: theta[k].abs() * x for k, x in unit(scaled).items()}


def sam_gradient(run, batch, g, rho):
    return run.grad(batch, run.moved(rho, unit(g)))


# ---------------------------------------------------------------------------------------------------- when to perturb


def rst(run, rho, p, end=None, steps=None, shape="constant"):
    """Zhao et al. 2022, Algorithm 1: SAM with probability p."""
    for t, batch in run.steps():
        done = t / steps if steps else 0.0
        share = 0.5 - 0.5 * math.cos(math.pi * done) if shape == "trigonometric" else done
        chance = (1 - share) * p + share * (end or 0.0)
        g, perturbs = run.grad(batch), run.uniform(t) < chance
        run.descend(sam_gradient(run, batch, g, rho) if perturbs else g, perturbs)


def along(g, g_v, alpha, per_tensor):
    """g + alpha ||g||/||g_v|| g_v."""
    if per_tensor:
        return {k: g[k] + alpha * g[k].norm() / g_v[k].norm() * g_v[k] for k in g}
    return lin((1.0, g), (alpha * math.sqrt(dot(g, g) / dot(g_v, g_v)), g_v))


def orthogonal(g, g_hat, per_tensor):
    """g_v, the part of the second gradient that is orthogonal to the first."""
    if per_tensor:
        return {k: g_hat[k] - (g[k] * g_hat[k]).sum() / (g[k] ** 2).sum() * g[k] for k in g}
    return lin((1.0, g_hat), (-dot(g, g_hat) / dot(g, g), g))


def looksam(run, rho, k, alpha=0.7, per_tensor=False):
    """Liu et al. 2022, Algorithm 1."""
    for t, batch in run.steps():
        g = run.grad(batch)
        if t % k == 0:
            d = sam_gradient(run, batch, g, rho)
            run.held["orthogonal"] = orthogonal(g, d, per_tensor)
        else:
            d = along(g, run.held["orthogonal"], alpha, per_tensor)
        run.descend(d, t % k == 0)


def large(run, t, g, steps, delta, lambda1=-1.0, lambda2=1.0):
    """Jiang et al. 2023: is ||g||^2 >= mu + c sigma, with both averages from zero and of this gradient too?"""
    squared = float(dot(g, g))
    run.mean = delta * getattr(run, "mean", 0.0) + (1 - delta) * squared
    run.variance = delta * getattr(run, "variance", 0.0) + (1 - delta) * (squared - run.mean) ** 2
    c = (t / steps) * lambda1 + (1 - t / steps) * lambda2
    return squared >= run.mean + c * math.sqrt(run.variance)


def aesam(run, rho, **threshold):
    for t, batch in run.steps():
        g = run.grad(batch)
        perturbs = large(run, t, g, **threshold)
        run.descend(sam_gradient(run, batch, g, rho) if perturbs else g, perturbs)


def aelooksam(run, rho, alpha, **threshold):
    for t, batch in run.steps():
        d = g = run.grad(batch)
        perturbs = large(run, t, g, **threshold)
        if perturbs:
            d = sam_gradient(run, batch, g, rho)
            run.held["orthogonal"] = orthogonal(g, d, False)
        elif "orthogonal" in run.held:
            d = along(g, run.held["orthogonal"], alpha, False)
        run.descend(d, perturbs)


def late_sam(run, rho, steps, fraction):
    """Zhou et al. 2025: the base optimizer first, SAM in the last steps."""
    for t, batch in run.steps():
        g, perturbs = run.grad(batch), steps - t <= fraction * steps
        run.descend(sam_gradient(run, batch, g, rho) if perturbs else g, perturbs)


# --------------------------------------------------------------------------------------- which gradient to step along


def surrogate_gap(g, g_hat, alpha):
    """Zhuang et al. 2022: g_hat - alpha g_perp."""
    g_perp = lin((1.0, g), (-dot(g, g_hat) / dot(g_hat, g_hat), g_hat))
    return lin((1.0, g_hat), (-alpha, g_perp))


def gsam(run, rho, alpha):
    for _, batch in run.steps():
        g = run.grad(batch)
        radius = rho(run.base.lr) if callable(rho) else rho
        run.descend(surrogate_gap(g, sam_gradient(run, batch, g, radius), alpha))


def norm_penalty(run, rho, alpha, normalized=False):
    """Zhao et al. 2022 (gradient norm), Eq. 10; their code has the unit vector along the first gradient."""
    for _, batch in run.steps():
        g = run.grad(batch)
        run.descend(lin((1 - alpha, unit(g) if normalized else g), (alpha, sam_gradient(run, batch, g, rho))))


def multi_step_sam(run, rho, k, renormalize=True):
    """k ascents: the unit gradients added up, each taken where the last ascent led; stretched to rho, or not."""
    for _, batch in run.steps():
        run.descend(ascents(run, batch, rho, k, renormalize)[-1])


def lookbehind(run, rho, k, alpha):
    """Mordido et al. 2024: k ascents of rho, and from theta k steps along their gradients, of which alpha remains."""
    for _, batch in run.steps():
        found = ascents(run, batch, rho, k, False)
        run.descend({name: alpha * sum(g[name] for g in found) for name in run.theta})


def ascents(run, batch, rho, k, renormalize):
    """The gradients at the points that k ascents reach."""
    g, eps, found = run.grad(batch), lin((0.0, run.theta)), []
    for _ in range(k):
        eps = lin((1.0, eps), (1.0, unit(g)))
        g = run.grad(batch, run.moved(rho, unit(eps) if renormalize else eps))
        found.append(g)
    return found


def wsam(run, rho, gamma, decouple=True):
    """Yue et al. 2023: g + alpha (g_hat - g), alpha = gamma/(1 - gamma); decoupled, the second term beside the base."""
    alpha = gamma / (1 - gamma)
    for _, batch in run.steps():
        g = run.grad(batch)
        sharpness = lin((1.0, sam_gradient(run, batch, g, rho)), (-1.0, g))
        run.descend(g if decouple else lin((1.0, g), (alpha, sharpness)))
        if decouple:
            run.theta = lin((1.0, run.theta), (-run.base.lr * alpha, sharpness))


def stable_sam(run, rho):
    """Tan et al. 2025: the second gradient, as long as the first."""
    for _, batch in run.steps():
        g = run.grad(batch)
        g_hat = sam_gradient(run, batch, g, rho)
        run.descend(lin((math.sqrt(dot(g, g)) / math.sqrt(dot(g_hat, g_hat)), g_hat)))


# -------------------------------------------------------------------------------------------------------- how far


def le_sam(run, rho, rho_max):
    """Wang et al. 2026: rho_t = min(sigma/||g||, rho_max); ``rho`` is sigma."""
    for _, batch in run.steps():
        g = run.grad(batch)
        norm, radii = math.sqrt(dot(g, g)), rho if isinstance(rho, dict) else dict.fromkeys(g, rho)
        run.descend(sam_gradient(run, batch, g, {k: min(sigma / norm, rho_max) for k, sigma in radii.items()}))


def usam(run, rho, lam):
    """Oikonomou & Loizou 2025: eps = rho (1 - lambda + lambda/||g||) g."""
    for _, batch in run.steps():
        g = run.grad(batch)
        eps = lin((1 - lam + lam / math.sqrt(dot(g, g)), g))
        run.descend(run.grad(batch, run.moved(rho, eps)))


def lightsam(run, rho, eps=1e-8):
    """Cheng et al. 2025, the ascent of LightSAM-I: eps = rho g/sqrt(u), u <- u + ||g||^2."""
    u = eps**2
    for _, batch in run.steps():
        g = run.grad(batch)
        u += float(dot(g, g))
        run.descend(run.grad(batch, run.moved(rho, lin((1 / math.sqrt(u), g)))))


# --------------------------------------------------------------------------------- which direction to perturb along


def random_start(run, t, batch, rho, gamma, lam, noise_scale, transposed):
    """Liu et al. 2022, Algorithm 1: the gradients at theta + delta_0, and at theta + eps."""
    noise, delta = run.draw(normals, t, NOISE), {}
    for k, w in run.theta.items():
        others = tuple(d for d in range(w.ndim) if d != (1 if k in transposed else 0)) if w.ndim > 1 else None
        norm = torch.linalg.vector_norm(w, dim=others, keepdim=w.ndim > 1)
        deviation = gamma * norm if noise_scale == "std" else (gamma**2 * norm).sqrt()
        delta[k] = deviation * noise[k]
    g = run.grad(batch, run.moved(1.0, delta))
    return g, run.grad(batch, run.moved(rho, unit(lin((1.0, delta), (lam, g)))))


def rsam(run, rho, gamma, lam, transposed, noise_scale="variance"):
    for t, batch in run.steps():
        run.descend(random_start(run, t, batch, rho, gamma, lam, noise_scale, transposed)[1])


def rgsam(run, rho, alpha, gamma, lam, transposed, noise_scale="variance"):
    for t, batch in run.steps():
        g, g_hat = random_start(run, t, batch, rho, gamma, lam, noise_scale, transposed)
        run.descend(surrogate_gap(g, g_hat, alpha))


def sampa(run, rho, lam):
    """Xie et al. 2024: the gradient at y, where SGD would go along the last one; the other at theta + rho a/||a||."""
    a, base = lin((0.0, run.theta)), run.base
    sgd = isinstance(base, oracle.SGD)
    for _, batch in run.steps():
        ahead = a
        if sgd:
            ahead = lin((1.0, a), (base.weight_decay, run.theta))
            ahead = lin((1.0, ahead), (base.momentum, base.buffers)) if base.buffers else ahead
        g = run.grad(batch, lin((1.0, run.theta), (-base.lr, ahead)))
        run.descend(lin((1 - lam, run.grad(batch, run.moved(rho, unit(a)))), (lam, g)))
        a = g


def random_sam(run, rho):
    """Ujvary et al. 2022: eps ~ N(0, rho^2/d)."""
    d = sum(x.numel() for x in run.theta.values())
    for t, batch in run.steps():
        run.descend(run.grad(batch, run.moved(rho, lin((1 / math.sqrt(d), run.draw(normals, t, NOISE))))))


def msam(run, rho):
    """Becker et al. 2024, Algorithm 1: the gradient at w - rho v/||v||; v is what the base optimizer has summed up."""
    for _, batch in run.steps():
        sgd = isinstance(run.base, oracle.SGD)
        v = dict(run.base.buffers) if sgd else {k: m for k, (_, m, _) in run.base.moments.items()}
        v = v or lin((0.0, run.theta))
        run.descend(run.grad(batch, run.moved(rho, lin((-1.0, unit(v))))))


def friendly(run, rho, sigma, decay, update_first=False, adaptive=False):
    """Li et al. 2024, Algorithm 1; in the first step d and m are the gradient. ``adaptive`` is that of their code."""
    m = None
    for _, batch in run.steps():
        g = run.grad(batch)
        new = g if m is None else lin((decay, m), (1 - decay, g))
        d = g if m is None else lin((1.0, g), (-sigma, new if update_first else m))
        m = run.held["average"] = new
        run.descend(run.grad(batch, run.moved(rho, scaled_unit(d, run.theta if adaptive else None))))


def vasso(run, rho, theta, adaptive=False):
    """Li & Giannakis 2023, Eqs. 8 and 9."""
    d = None
    for _, batch in run.steps():
        g = run.grad(batch)
        d = run.held["average"] = g if d is None else lin((1 - theta, d), (theta, g))
        run.descend(run.grad(batch, run.moved(rho, scaled_unit(d, run.theta if adaptive else None))))


def fisher_sam(run, rho, eta):
    """Kim et al. 2022, Eqs. 9 and 10, with f = g^2."""
    for _, batch in run.steps():
        g = run.grad(batch)
        inverse = {k: x / (1 + eta * x**2) for k, x in g.items()}
        run.descend(run.grad(batch, run.moved(rho, lin((1 / math.sqrt(dot(g, inverse)), inverse)))))


def sparse(run, rho, sparsity=0.5, kind="fisher", interval=None, drop=0.5, steps=None):
    """Mi et al. 2022, Algorithms 1 and 2."""
    mask = None
    sizes = [x.numel() for x in run.theta.values()]
    total = sum(sizes)
    kept = round((1 - sparsity) * total)

    def flat(tensors):
        return torch.cat([tensors[k].reshape(-1) for k in run.theta])

    for t, batch in run.steps():
        g = run.grad(batch)
        size = flat(g).abs()
        if (mask is None and kind == "fisher") or (kind == "fisher" and interval and t % interval == 0):
            mask = torch.zeros(total, dtype=torch.bool).index_fill(0, size.topk(kept).indices, True)
        elif mask is None:
            drawn = flat(run.draw(words, t, REGROWTH))
            mask = torch.zeros(total, dtype=torch.bool).index_fill(0, drawn.topk(kept).indices, True)
        elif interval and t % interval == 0:
            count = min(round(drop * (1 + math.cos(math.pi * t / steps)) / 2 * kept), total - kept)
            drawn = flat(run.draw(words, t, REGROWTH)).masked_fill(mask, -1)
            stay = size.masked_fill(~mask, -1.0).topk(kept - count).indices
            mask = torch.zeros_like(mask).index_fill(0, torch.cat([stay, drawn.topk(count).indices]), True)
        parts = mask.split(sizes)
        run.held["mask"] = {k: part.reshape(run.theta[k].shape) for k, part in zip(run.theta, parts, strict=True)}
        eps = unit(g)
        run.descend(run.grad(batch, run.moved(rho, {k: x * run.held["mask"][k] for k, x in eps.items()})))


def esam(run, rho, gamma, beta=0.5, granularity="element", drawn_norm=False, adaptive=False):
    """Du et al. 2022, Algorithm 1; ``adaptive`` and the norm of the drawn tensors are those of their code."""
    for t, batch in run.steps():
        g, T = run.grad(batch), run.theta if adaptive else None
        eps = scaled_unit(g, T)
        if granularity == "tensor":
            draws = Randomness(run.seed, True).uniforms(t, len(g), DRAWS)
            part = {k: float(u < beta) for k, u in zip(g, draws, strict=True)}
        else:
            part = {k: (w / 2.0**32 < beta).double() for k, w in run.draw(words, t, DRAWS).items()}
        if drawn_norm:
            eps = scaled_unit({k: part[k] * x for k, x in g.items()}, T)
        there = run.moved(rho, {k: part[k] * x / beta for k, x in eps.items()})
        with torch.no_grad():
            rise = run.losses(there, batch) - run.losses(run.theta, batch)
        chosen = sorted(sorted(range(len(rise)), key=lambda i: -rise[i])[: math.ceil(gamma * len(rise))])
        run.descend(run.grad((batch[0][chosen], batch[1][chosen]), there))


def delta_sam(run, rho, power=-1.0):
    """Zhou et al. 2021; a sample's gradient in the logits of the cross entropy is softmax(z) - onehot(y)."""
    for _, batch in run.steps():
        with torch.no_grad():
            outputs = run.outputs(run.theta, batch)
        norms = (outputs.softmax(1) - nn.functional.one_hot(batch[1], outputs.shape[1])).norm(dim=1)
        weights = norms**power / (norms**power).sum()
        run.descend(sam_gradient(run, batch, run.grad(batch, weights=weights), rho))


def bsam(run, rho, lr, data_size, beta1=0.9, beta2=0.999, weight_decay=1e-4, damping=0.1, precision=1.0):
    """Möllenhoff & Khan 2023, Algorithm 1; no base optimizer."""
    s = {k: torch.full_like(x, precision) for k, x in run.theta.items()}
    m = {k: torch.zeros_like(x) for k, x in run.theta.items()}
    for t, batch in run.steps():
        noise = run.draw(normals, t, NOISE)
        g = run.grad(batch, run.moved(1.0, {k: noise[k] / (data_size * s[k]).sqrt() for k in s}))
        g_hat = run.grad(batch, run.moved(rho, {k: g[k] / s[k] for k in s}))
        m = lin((beta1, m), (1 - beta1, lin((1.0, g_hat), (weight_decay, run.theta))))
        s = {k: beta2 * s[k] + (1 - beta2) * (s[k].sqrt() * g[k].abs() + weight_decay + damping) for k in s}
        run.theta = {k: w - lr * m[k] / s[k] for k, w in run.theta.items()}
        run.held["precision"], run.held["exp_avg"] = s, m
        run.perturbed.append(True)
