"""The demo: real digits, wrong labels, a small CNN, and the radius of SAM and ASAM fixed or learned.

``methods.py`` builds the optimizers and ``train.py`` uses them; the rest is data, processes, tables and plots.
"""
