"""``python -m lets_kernels bench``: what a SAM step costs here, against other code that takes the same step.

``contenders.py`` says who takes part, ``compare.py`` validates and then times them, ``run.py`` keeps to the time there
is; ``eager.py``, ``shapes.py`` and ``clock.py`` are what the repository's benchmarks share with it.
"""
