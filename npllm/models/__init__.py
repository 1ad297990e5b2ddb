"""The wiring: how operations make a block, and blocks a model.  Everything here takes the set of
ops as an argument.
"""
