"""Recorders: files that run beside another implementation and write down its values.

Each is one file that does not import npllm, so that it can be copied.
"""
