"""GGUF files, llama.cpp's format, read as they are and written.

Belongs here: header, metadata, tokenizer, tensors of such a file.
Does not belong here: what a block of weights means (quantized/), its products (kernels/).
"""
