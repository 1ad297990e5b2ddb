"""What scripts/bench.py measures: one file a command, or a few commands that share their options.

`processes` starts the contenders, `contenders` holds the engines.  npllm imports nothing of it.
"""
