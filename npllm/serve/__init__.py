"""The HTTP interface: OpenAI's requests and answers.

Belongs here: requests, limits, answers.  Does not: scheduling (continuous_batching/).
"""
