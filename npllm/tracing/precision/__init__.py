"""What float32, 16-bit arithmetic and quantised weights cost on a prompt, against float64.

Belongs here: the passes, the figures and their report.  Does not: emulated operations (ops/).
"""

from npllm.tracing.precision.measuring import precision

__all__ = ["precision"]
