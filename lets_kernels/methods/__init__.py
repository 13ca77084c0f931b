"""One page for each method: its class, and below the class its paper, its cost, and the source of each default.

SAM itself, the base class of all methods, is in lets_kernels/sam.py. :mod:`.catalogue` finds and prints the pages.
"""
