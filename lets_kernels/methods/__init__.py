"""One page for each method: its class, and below the class its paper, its cost, and the source of each default.

SAM itself, the base class of all methods, is in lets_kernels/sam.py. :mod:`.catalogue` finds and prints the pages.
Close relatives share a file: AE-SAM and AE-LookSAM are in looksam.py, VaSSO in friendly.py, δ-SAM in esam.py, Sparse
SAM in fisher.py, Random SAM in rsam.py, R-GSAM and the gradient-norm penalty in gsam.py.
"""
