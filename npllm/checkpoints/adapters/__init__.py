"""LoRA adapters: PEFT's folders, and which rows of which weight each of their tensors updates.

How a model runs with one is `npllm.models.adapted`.
"""
