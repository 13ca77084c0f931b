"""A page a method: its class, and below it where it is from, what it costs and whose its defaults are.

SAM itself, the engine of all of them, is lets_kernels/sam.py. :mod:`.catalogue` finds the pages and prints them.
"""
