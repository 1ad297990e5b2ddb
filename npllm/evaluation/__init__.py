"""Evaluation on the tasks of lm-eval (the EleutherAI language model evaluation harness).

Belongs here: scoring of many continuations, and the class that lm-eval calls.  Does not: tasks and
metrics, which are lm-eval's.
"""
