"""The demo: real digits, wrong labels, a small CNN, and SAM with a radius that is fixed, found or learned.

``methods.py`` builds the optimizers and ``train.py`` uses them; the rest is data, processes, a table and a plot.
"""
