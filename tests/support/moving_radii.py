"""Radii that move by themselves, made anew for every optimizer; they go through all of their phases in ten steps."""

import lets_kernels as lk


def auto(rho=0.05, **options):
    """``rho="auto"`` for a short training; `rho` is that of the first step."""
    return lk.AutoRadius(rho, constants=lk.AutoConstants(start=3), **options)


def following(rho=0.1, curvature="secant", **options):
    """LETS whose validation gradient is the next step's first one."""
    return lk.LearnedRadius(rho, validation="next", curvature=curvature, lr=0.05, **options)
