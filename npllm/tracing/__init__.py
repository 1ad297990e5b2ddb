"""Tracing: every value of a forward pass by name.

Belongs here: making, saving and reading traces, and what a trace shows (lens).  comparison/: where
another implementation departs.  precision/: what an arithmetic costs.  recorders/ and readers/:
traces of other programs.
"""
