"""Kernels: the same operations as `npllm.ops`, fast."""
