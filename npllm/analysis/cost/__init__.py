"""Count what a model costs, from its configuration alone: parameters, operations, bytes moved,
bytes of KV cache.

Belongs here: formulas, and the counting run that confirms them.  Does not: measured times
(`npllm.analysis.speed`, `npllm.analysis.profiling`).

No formula runs a model or needs weights.  `counting_ops` is a set of operations that counts while
it runs; the tests compare its counts with the formulas, number by number.

Conventions of the formulas and of the counting run:

    one operation   a product, a sum, a comparison for a maximum, exp, sqrt, sin, cos, a quotient
    linear          2 * d_in for each output, one more with a bias
    rms_norm        4 * d + 3 for each row: squares, sum, the factor (mean, eps and root),
                    x / root, times weight
    rope_tables     for each position: d_rope / 2 products, then sin, cos and two scalings of
                    d_rope each
    apply_rope      3 for each rotated channel
    attention       2 * d_head + 1 + 5 + 2 * d_value for each visible pair of query and key and
                    each query head: the score, its scale, the softmax (maximum, difference, exp,
                    sum, quotient), the weighted value
    swiglu          5 for each channel: -x, exp, 1 +, the quotient, times up
    embed           none

Bytes: each operation reads its arguments once and writes its result once.  No value stays in fast
memory between two operations, and none is moved twice within one.  `embed` reads only the rows that
it gathers.  Not counted, since they belong to no operation: sums of the residual stream (2 d_model
for each token and layer), copies into the cache, and the evaluation of masks.
"""

from npllm.analysis.cost.cache_bytes import kv_cache_bytes, kv_table
from npllm.analysis.cost.counting import COUNTS, bytes_moved, counting_ops
from npllm.analysis.cost.facts import cost_facts
from npllm.analysis.cost.operations import Cost, visible_pairs
from npllm.analysis.cost.parameters import parameter_counts
from npllm.analysis.cost.passes import (
    decode_cost,
    forward_cost,
    prefill_cost,
    total,
    uncached_flops,
)
from npllm.analysis.cost.weight_bytes import gguf_weight_bytes, weight_bytes

__all__ = [
    "COUNTS",
    "Cost",
    "bytes_moved",
    "cost_facts",
    "counting_ops",
    "decode_cost",
    "forward_cost",
    "gguf_weight_bytes",
    "kv_cache_bytes",
    "kv_table",
    "parameter_counts",
    "prefill_cost",
    "total",
    "uncached_flops",
    "visible_pairs",
    "weight_bytes",
]
