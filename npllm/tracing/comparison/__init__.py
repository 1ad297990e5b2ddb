"""Comparing two traces: the walk in the order of execution, each operation again from recorded
inputs, and the name of what is wrong.

Belongs here: everything behind `npllm.compare`.  Does not: how a trace is made or read (tracing/),
budgets of single operations (testing/).
"""
