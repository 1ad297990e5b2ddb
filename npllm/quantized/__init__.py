"""Weights that are not arrays of floats: formula, rows, widening to float32.

Belongs here: one file for each family of formats.
Does not belong here: reading a file of that format (checkpoints/), a fast product (kernels/).
"""
