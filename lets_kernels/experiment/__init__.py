"""``lets-kernels experiment``: the papers' experiments, each as a named recipe that one command runs.

``recipes`` says what the papers did; ``images``, ``glue`` and ``translation`` read data from a folder, and ``networks``
builds what is trained on it; ``train`` makes one run, ``campaign`` all of a recipe, ``report`` tables, ``figures``
figures of them.
"""
