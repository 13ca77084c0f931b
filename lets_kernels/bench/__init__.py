"""``python -m lets_kernels bench``: what a SAM step costs here, against other code that takes the same step.

``contenders.py`` says who takes part, ``compare.py`` validates and then times them, ``run.py`` keeps to the time there
is. ``training.py`` and ``multiples.py`` time whole steps, ``growth.py`` shows how a step grows. ``contenders.py``,
``eager.py``, ``shapes.py`` and ``clock.py`` are what the repository's benchmarks share with it.
"""
