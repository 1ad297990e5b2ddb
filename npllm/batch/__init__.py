"""Files of many prompts: `npllm batch`, on one machine or on a Ray cluster.

Belongs here: rows, resuming, output files.  Does not: scheduling (continuous_batching/).
"""
