"""A radius that finds itself: learned by bilevel optimisation (LETS), or by what the steps show (``rho="auto"``)."""
