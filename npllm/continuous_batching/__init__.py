"""Continuous batching: prompts that join and leave between the decoding steps of one model.

Belongs here: jobs, rows, kept caches, the engine.  Does not: requests (serve/), files (batch/).
"""
