"""Twins of the operations for the CPU: in plain NumPy (tiled) and compiled with Numba.

Belongs here: code for one processor.  Does not: a definition (ops/), the choice of a set
(kernels/__init__).
"""
