"""Float64 oracles, written from the papers and from nothing else.

First half: one function an op, on lists of float64 vectors in memory order (the exact values of the inputs, upcast).
Second half: the papers' algorithms, ten lines each, on a dictionary of float64 weights and `torch.autograd.grad`; the
base optimizers are transcribed from the pseudo-code of their torch.optim pages.  Nothing here imports `lets_kernels`.
"""

import math
from dataclasses import dataclass, field

import torch

from lets_kernels.ops.declared import ELEMENT_WISE, FISHER, UNSCALED

# ------------------------------------------------------------------------------------------------------------ the ops


def scale(v, theta, row, filter_norms, xi):
    """T of one run: 1, |theta| + xi, its filter's norm + xi, or the root of the Fisher information's 1 / (1 + xi v^2).

    row: of the run table.
    """
    _, numel, length, count, first = (int(x) for x in row)
    if length == FISHER:
        return (1 / (1 + xi * v**2)).sqrt()
    if length == UNSCALED:
        return torch.ones(numel, dtype=torch.float64)
    if length == ELEMENT_WISE:
        return theta.abs() + xi
    return filter_norms[first + torch.arange(numel) // length % count] + xi


def grad_norm(vectors, thetas, table, filter_norms, xi, q):
    """sum |T v|^q."""
    terms = (scale(v, t, row, filter_norms, xi) * v for v, t, row in zip(vectors, thetas, table, strict=True))
    return math.fsum(float((x.abs() ** q).sum()) for x in terms)


def filter_norms(thetas, table, out):
    """The 2-norm of each filter, at filter_start + filter; entries of `out` that belong to no filter stay."""
    out = out.clone()
    for theta, (_, numel, length, count, first) in zip(thetas, table.tolist(), strict=True):
        if length >= 1:
            squares = torch.zeros(count, dtype=torch.float64)
            squares.index_add_(0, torch.arange(numel) // length % count, theta**2)
            out[first : first + count] = squares.sqrt()
    return out


def direction(vectors, thetas, table, filter_norms, xi, q):
    """T sign(v) |T v|^(q-1), before the division by the norm."""
    result = []
    for v, theta, row in zip(vectors, thetas, table, strict=True):
        t = scale(v, theta, row, filter_norms, xi)
        result.append(t * v.sign() * (t * v).abs() ** (q - 1))
    return result


def perturbation(vectors, thetas, table, filter_norms, xi, q, total, rho):
    """eps = rho T sign(v) |T v|^(q-1) / total^(1/p), 1/p + 1/q = 1; zero where the total is zero or not finite."""
    if total == 0 or not math.isfinite(total):
        return [torch.zeros_like(v) for v in vectors]
    root = total ** (1 - 1 / q)
    return [rho * d / root for d in direction(vectors, thetas, table, filter_norms, xi, q)]


def rho_grad_diagonal(val, train, perturbed, vectors, thetas, table, filter_norms, xi, q):
    """The terms of sum (val - train) perturbed^2 T sign(v) |T v|^(q-1); the caller sums (and bounds) them."""
    directions = direction(vectors, thetas, table, filter_norms, xi, q)
    return [(a - b) * c**2 * d for a, b, c, d in zip(val, train, perturbed, directions, strict=True)]


def rho_grad_secant(val, train, perturbed, first):
    """The terms of sum (val - train) (perturbed - first)."""
    return [(a - b) * (c - d) for a, b, c, d in zip(val, train, perturbed, first, strict=True)]


# ----------------------------------------------------------------- the base optimizers, as their torch pages print them


@dataclass
class SGD:
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    maximize: bool = False
    buffers: dict = field(default_factory=dict)

    def step(self, theta, grads):
        result = dict(theta)
        for name, g in grads.items():
            g = (-g if self.maximize else g) + self.weight_decay * theta[name]
            if self.momentum:
                old = self.buffers.get(name)
                self.buffers[name] = g if old is None else self.momentum * old + (1 - self.dampening) * g
                g = g + self.momentum * self.buffers[name] if self.nesterov else self.buffers[name]
            result[name] = theta[name] - self.lr * g
        return result

    def state(self, name):
        return {"momentum_buffer": self.buffers[name]} if self.momentum else {}


@dataclass
class Adam:
    lr: float = 1e-3
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    moments: dict = field(default_factory=dict)

    def step(self, theta, grads):
        b1, b2 = self.betas
        result = dict(theta)
        for name, g in grads.items():
            x, g = theta[name], -g if self.maximize else g
            if self.decoupled:
                x = x - self.lr * self.weight_decay * x
            else:
                g = g + self.weight_decay * x
            t, m, v = self.moments.get(name, (0, torch.zeros_like(x), torch.zeros_like(x)))
            t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            self.moments[name] = t, m, v
            result[name] = x - self.lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return result

    def state(self, name):
        t, m, v = self.moments[name]
        return {"step": torch.tensor(float(t)), "exp_avg": m, "exp_avg_sq": v}


@dataclass
class RMSprop:
    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    squares: dict = field(default_factory=dict)

    def step(self, theta, grads):
        result = dict(theta)
        for name, g in grads.items():
            v = self.alpha * self.squares.get(name, torch.zeros_like(g)) + (1 - self.alpha) * g**2
            self.squares[name] = v
            result[name] = theta[name] - self.lr * g / (v.sqrt() + self.eps)
        return result

    def state(self, name):
        return {"square_avg": self.squares[name]}


# -------------------------------------------------------------------------------------- the papers, one function a part


def gradient(loss, theta, batch):
    """The loss and its gradient at theta (a dictionary of tensors); weights the loss does not use have none."""
    leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}
    value = loss(leaves, batch)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def identity(theta):
    return {name: torch.ones_like(x) for name, x in theta.items()}


def elementwise(xi, scale_bias=True):
    """Kwon et al. 2021: T = |theta| + xi; T = 1 for whatever is not called "weight" unless scale_bias."""
    return lambda theta: {
        name: x.abs() + xi if scale_bias or "weight" in name else torch.ones_like(x) for name, x in theta.items()
    }


def filterwise(xi, scale_bias=True, transposed=()):
    """Wang et al. 2024, Eq. 7: ||c_i|| + xi on conv filter i, |theta| + xi elsewhere."""

    def operator(theta):
        result = elementwise(xi, scale_bias)(theta)
        for name, x in theta.items():
            if x.ndim >= 3:
                others = tuple(d for d in range(x.ndim) if d != (1 if name in transposed else 0))
                result[name] = torch.linalg.vector_norm(x, dim=others, keepdim=True).expand_as(x) + xi
        return result

    return operator


def unit(g, T, p=2.0):
    """The maximiser of <g, eps> over ||T^-1 eps||_p <= 1: Foret et al. Eq. 2 (T = 1), Kwon et al. Eq. 6 (p = 2)."""
    power = 0.0 if p == math.inf else 1 / (p - 1)  # q - 1
    total = sum(((T[k] * g[k]).abs() ** (power + 1)).sum() for k in g)
    if total == 0:
        return {k: torch.zeros_like(g[k]) for k in g}
    root = total ** (1 / p)  # 1 / inf is 0
    return {k: T[k] * g[k].sign() * (T[k] * g[k]).abs() ** power / root for k in g}


def auto(g, g_hat, delta, lr, now, c):
    """The next state of a radius that finds itself, from a dictionary of numbers and the constants c: docs/radius.md.

    delta: how far the weights have moved since the last step.
    """
    d = {k: g_hat[k] - g[k] for k in g}
    size, after, change = (math.sqrt(float(dot(x, x))) for x in (g, g_hat, d))
    moved = math.sqrt(float(dot(delta, delta)))
    nu, t = now["log_rho"], now["steps"]
    kappa, m = change / size, change / max(size, after)
    new = {**now, "steps": t + 1, "highest_lr": max(now["highest_lr"], lr)}
    scale = math.log(kappa) - nu
    new["length"] = scale if t == 0 else c.length_decay * now["length"] + (1 - c.length_decay) * scale
    if t < c.start:
        up = math.log(c.start_change / kappa) / (1 + t)
        new["log_rho"] = nu + min(max(up, -c.start_bound), c.start_bound)
        return new
    if moved > 0:  # the mean of the cosines so far, weighted by how long ago they were
        cosine = -float(dot(g, delta)) / (size * moved)
        share = 1 - c.headway_decay ** (lr / new["highest_lr"])
        total = (1 - share) * now["headway_weight"] + share
        new["headway"] = ((1 - share) * now["headway_weight"] * now["headway"] + share * cosine) / total
        new["headway_weight"] = total
    wanted = c.change * math.exp(-c.slope * min(new["headway"], c.most_headway))
    up = min(math.log(wanted) - new["length"] - nu, math.log(c.most_change / m))
    new["log_rho"] = nu + c.rate * min(max(up, -c.bound), c.bound)
    return new


def dot(a, b):
    return sum((a[k] * b[k]).sum() for k in a)


def sam(loss, theta, batches, base, rho, T=identity, p=2.0):
    """SAM (Foret et al., Algorithm 1) and ASAM (Kwon et al., Algorithm 1). rho: a float or a function of the step."""
    for t, (batch, _) in enumerate(batches):
        radius = rho(t) if callable(rho) else rho
        _, g = gradient(loss, theta, batch)
        eps = unit(g, T(theta), p)
        _, g_hat = gradient(loss, {k: theta[k] + radius * eps[k] if k in eps else theta[k] for k in theta}, batch)
        theta = base.step(theta, g_hat)
    return theta


def hypergradient(theta, T, g, g_hat, g_train, g_val, gap, rho, eta, metric, curvature, direction, p=2.0):
    """dF/drho of design.md section 9 (Wang et al., Algorithm 1): -eta w (g_val - g_train)^T H eps_hat, T at theta_t."""
    difference = g_val if metric == "validation_loss" else {k: g_val[k] - g_train[k] for k in g_val}
    weight = gap if metric == "squared_gap" else 1.0
    if curvature == "secant":
        product = {k: (g_hat[k] - g[k]) / rho for k in g}
    else:
        eps = unit(g if direction == "epsilon" else g_train, T(theta), p)
        product = {k: g_hat[k] ** 2 * eps[k] for k in g}
    return -eta * weight * dot(difference, product)


def lets(
    loss, theta, batches, base, rho, nu_base, metric, curvature, direction="epsilon", T=identity, p=2.0, **options
):
    """LETS-SAM / LETS-ASAM (Wang et al., Algorithm 1).  nu = log rho.  Returns the weights and rho after every step.

    following: the gradient of the next batch stands for that of a validation batch.  share: of the radius that step t,
    from 0, perturbs by.
    """
    interval, reuse = options.get("interval", 1), options.get("reuse", False)
    following, share = options.get("following", False), options.get("share", lambda t: 1.0)
    radii, held = [], None
    nu = {"nu": torch.tensor(math.log(rho), dtype=torch.float64)}

    def learn(nu, parts, train_loss, g_train):
        theta_t, g, g_hat, g_val, val_loss, radius = parts
        if following:
            g_val, val_loss = g_train, train_loss
        gap = val_loss - train_loss
        slope = hypergradient(
            theta_t, T, g, g_hat, g_train, g_val, gap, radius, base.lr, metric, curvature, direction, p
        )
        return nu_base.step(nu, {"nu": radius * slope})

    for t, (batch, val_batch) in enumerate(batches, start=1):
        value, g = gradient(loss, theta, batch)
        if held is not None:
            nu, held = learn(nu, held, value, g), None
        radius = nu["nu"].exp() * share(t - 1)
        eps = unit(g, T(theta), p)
        _, g_hat = gradient(loss, {k: theta[k] + radius * eps[k] for k in theta}, batch)
        before, theta = theta, base.step(theta, g_hat)
        if t % interval == 0:
            val_loss, g_val = gradient(loss, theta, val_batch)
            parts = before, g, g_hat, g_val, val_loss, radius
            if reuse or following:
                held = parts
            else:
                nu = learn(nu, parts, *gradient(loss, theta, batch))
        radii.append(nu["nu"].exp())
    return theta, radii
