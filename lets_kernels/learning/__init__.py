"""Radii that move by themselves: learned by bilevel optimisation (LETS), or found from the steps (``rho="auto"``)."""
