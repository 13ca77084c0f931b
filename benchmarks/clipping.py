"""A program: what clipping does to a radius that moves. ``python benchmarks/clipping.py [--out FILE]``, some minutes.

The MLP 64-128-128-10 on the digits with 40 % wrong labels, batches of 64, SGD with lr 0.05, momentum 0.9, weight decay
5e-4, gradients clipped to norm 0.5. Training goes on with one way of clipping; before each of 200 steps a copy of
network and optimizer takes the step on the same batches without clipping. Counted is where the sign of ∂F/∂ρ differs.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lets_kernels import SAM, LearnedRadius
from lets_kernels.demo.data import load
from lets_kernels.record import environment

STEPS, BATCH, SEEDS, MOST = 200, 64, 5, 0.5


class ClippedSGD(torch.optim.SGD):
    """Steps along clipped copies: whoever holds the gradients still has them as they were."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        factor = (MOST / (nn.utils.get_total_norm([p.grad for p in params]) + 1e-6)).clamp(max=1.0)
        for p in params:
            p.grad = p.grad * factor
        return super().step(closure)


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def step(net, optimizer, batches, where):
    """One step, with a validation batch if the radius learns from one; returns whether the second gradient was cut."""
    norms = []

    def closure_on(batch, always):
        calls = []

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(net(batch[0]), batch[1])
            loss.backward()
            calls.append(0)
            if where == "closures" or (where == "second" and (len(calls) == 2 and always)):
                norms.append(nn.utils.clip_grad_norm_(net.parameters(), MOST).item())
            return loss

        return closure

    closures = [closure_on(batch, index == 0) for index, batch in enumerate(batches)]
    optimizer.step(*(closures if optimizer.radius.learns else closures[:1]))
    return bool(norms) and norms[min(1, len(norms) - 1)] > MOST


def run(make_radius, where, seed, compare):
    data = load(seed, 0.4)
    torch.manual_seed(seed)
    net = network()
    base = ClippedSGD if where == "base" else torch.optim.SGD
    optimizer = SAM(net.parameters(), base, rho=make_radius(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    flips, active, rho = 0, 0, []
    for _ in range(STEPS):
        picked = [torch.randint(len(data.train_images), (BATCH,)) for _ in range(2)]
        batches = [(data.train_images[i].flatten(1), data.train_labels[i]) for i in picked]
        if compare:
            other_net, other = copy.deepcopy((net, optimizer))
            if where == "base":
                other.base_optimizer.__class__ = torch.optim.SGD
            step(other_net, other, batches, "nowhere")
        active += step(net, optimizer, batches, where)
        if compare:
            flips += (optimizer.metrics()["rho_grad"] * other.metrics()["rho_grad"] < 0).item()
        rho.append(float(optimizer.rho))
    return {"flips": flips, "active": active, "rho": sum(rho[-50:]) / 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = []
    for curvature in ("diagonal", "secant"):
        for where in ("nowhere", "closures", "second", "base"):
            found = [run(lambda c=curvature: LearnedRadius(0.05, curvature=c), where, s, True) for s in range(SEEDS)]
            rows.append({"radius": curvature, "clipped": where, "seeds": found})
            print(curvature, where, *(f"{r['flips']}/{r['active']}" for r in found), flush=True)
    for where in ("nowhere", "closures", "second", "base"):
        found = [run(lambda: "auto", where, s, False) for s in range(SEEDS)]
        rows.append({"radius": "auto", "clipped": where, "seeds": found})
        print("auto", where, *(f"{r['rho']:.2g}/{r['active']}" for r in found), flush=True)
    if out:
        out.write_text(json.dumps({"environment": environment(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
