"""The HTTP interface: OpenAI's requests and answers, and the engine that batches them.

Belongs here: requests, scheduling, answers.  Does not: any computation (`Model`, decoding/).
"""
