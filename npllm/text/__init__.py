"""Text to token ids and back.

Belongs here: tokenizer, chat template, text of a stream of ids.  Does not: which token comes next
(decoding/).
"""
