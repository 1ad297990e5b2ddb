"""Weights that are not arrays of floats: the formula, the rows, the widening.

Belongs here: one file a format.  Does not: reading a file of that format (checkpoints/), a fast product (kernels/).
"""
