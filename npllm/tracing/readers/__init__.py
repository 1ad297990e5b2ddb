"""Readers: dumps of other programs as traces under npllm's names.  None of them runs a model."""

from npllm.tracing.readers.arrays import read_arrays, rename_arrays
from npllm.tracing.readers.eval_callback import read_eval_callback

__all__ = ["read_arrays", "read_eval_callback", "rename_arrays"]
