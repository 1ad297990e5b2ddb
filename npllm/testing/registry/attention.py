"""Conventions of attention: heads, masks, softmax, operands, cache rows."""

from npllm.testing.registry.convention import Convention, Option

__all__ = ["ENTRIES"]

ATTENTION = ("attention",)
WITH_LSE = ("attention", "attention_lse")

ENTRIES = [
    Convention(
        "C8",
        "Expansion of grouped heads",
        {
            "repeat": Option("Query head h reads key/value head h // group."),
            "tile": Option("Query head h reads key/value head h mod n_kv_head.", WITH_LSE),
        },
        WITH_LSE,
        "algebraic",
        "Query head h reads key/value head h // group (np.repeat, not np.tile).",
        "jax-js#180",
    ),
    Convention(
        "C9",
        "Causal alignment",
        {
            "bottom-right": Option("The last query sees the last key."),
            "top-left": Option(
                "The first query sees the first key alone, whatever the cache holds.", WITH_LSE
            ),
            "one key late": Option("Each query sees one key of the future.", WITH_LSE),
            "one key early": Option("No query sees its own key.", WITH_LSE),
            "not causal": Option("Every query sees the future.", WITH_LSE),
        },
        WITH_LSE,
        "algebraic",
        "Queries are the last n_seq of the n_ctx slots: i + n_ctx - n_seq sees j <= that.",
        "cutlass#2336, onnx#8068",
    ),
    Convention(
        "C10",
        "Sliding window",
        {
            "w keys": Option("A query sees w keys, its own included: i - w < j <= i."),
            "w + 1 keys": Option("A query sees its own key and w before it.", WITH_LSE),
            "symmetric": Option("A query sees w - 1 keys to each side.", WITH_LSE),
            "ignored": Option("There is no window.", WITH_LSE),
        },
        WITH_LSE,
        "algebraic",
        "A window of w is w keys, the query's own included.",
        "zml#763",
    ),
    Convention(
        "C11",
        "Row without keys",
        {
            "zero": Option("A row that sees no key gives 0."),
            "NaN": Option("A row that sees no key gives NaN: 0 / 0.", ATTENTION),
            "mean of V": Option("A row that sees no key gives the mean of all values.", ATTENTION),
        },
        ATTENTION,
        "edge",
        "A row that sees no key is 0; Transformers' eager form leaves it undefined.",
        "iree#24175",
    ),
    Convention(
        "C12",
        "Mask fill",
        {
            "exclusion": Option("A hidden key has no part in the sum."),
            "finfo.min": Option(
                "The lowest finite number replaces the score: a row without keys sees all.",
                ATTENTION,
            ),
            "-1e9": Option(
                "-1e9 is added: in float32 it swallows the score, in steps of 64.", ATTENTION
            ),
            "-1e4": Option(
                "-1e4 is added: a row without keys sees all, and large scores leak.", ATTENTION
            ),
        },
        ATTENTION,
        "edge",
        "A hidden key is left out, not made improbable.",
        "iree#24175",
    ),
    Convention(
        "C14",
        "Softmax dtype, and the place of the scale",
        {
            "float32, on scores": Option(
                "The scores are scaled and the softmax is float32.", ATTENTION
            ),
            "softmax in the model dtype": Option(
                "Exponentials and sums are rounded to the 16-bit type.", ATTENTION
            ),
            "scale on q": Option("The query is scaled and rounded before the product.", ATTENTION),
        },
        ATTENTION,
        "rounding",
        "The softmax is float32, of scores that are scaled after the product.",
        "sglang#36173",
    ),
    Convention(
        "C21",
        "Softmax scale",
        {
            "d_head ** -0.5": Option(
                "The scale is that of the whole head, also under partial rotation."
            ),
            "rotated part": Option(
                "d_rope ** -0.5 (3/4 of the head where d_rope is not given).", WITH_LSE
            ),
            "1 / d_head": Option("The root is missing.", WITH_LSE),
            "constant 1/8": Option("A hard-coded scale, right for heads of 64.", WITH_LSE),
            "twice": Option("The scale is applied twice, to q and to the scores.", WITH_LSE),
            "omitted": Option("The scores are not scaled.", WITH_LSE),
        },
        WITH_LSE,
        "algebraic",
        "The scale is d_head ** -0.5 of the whole head.",
        "attorch#14",
    ),
    Convention(
        "C22",
        "Which operand is which",
        {
            "q, k, v": Option("Queries, keys, values."),
            "k and v swapped": Option(
                "Keys and values are exchanged.", ("attention", "qkv_projection")
            ),
            "q and k swapped": Option(
                "Queries and keys are exchanged.", ("attention", "qkv_projection")
            ),
        },
        ("attention", "qkv_projection"),
        "algebraic",
        "The order is q, k, v.",
        "tt-mlir#8958",
    ),
    Convention(
        "C23",
        "Keys beyond the end",
        {
            "masked": Option("Only real keys enter the softmax."),
            "zero tail to 16": Option(
                "Zeros fill the last tile of 16 keys and enter the sum.", WITH_LSE
            ),
            "zero tail to 32": Option(
                "Zeros fill the last tile of 32 keys and enter the sum.", WITH_LSE
            ),
            "zero tail to 64": Option(
                "Zeros fill the last tile of 64 keys, or an unused cache, and enter the sum.",
                WITH_LSE,
            ),
            "zero tail to 128": Option(
                "Zeros fill the last tile of 128 keys, or an unused cache, and enter the sum.",
                WITH_LSE,
            ),
            "padding enters": Option("Keys that are padding are seen.", WITH_LSE),
        },
        WITH_LSE,
        "edge",
        "Only real keys enter the softmax.",
        "flashinfer#5090, pytorch#169222",
    ),
    Convention(
        "C24",
        "Log-sum-exp",
        {
            "natural": Option("log sum exp(s), natural, the maximum added back."),
            "base 2": Option("The logarithm is that of base 2.", ("attention_lse",)),
            "without the maximum": Option("The maximum is not added back.", ("attention_lse",)),
        },
        ("attention_lse",),
        "algebraic",
        "The log-sum-exp is natural and complete.",
        "tokenspeed#571",
    ),
    Convention(
        "C32",
        "Cache rows",
        {
            "own rows": Option(
                "Keys and values of this request, the new ones behind the cached ones."
            ),
            "another request's rows": Option(
                "The cached rows are those of the request before it in the batch.", WITH_LSE
            ),
            "new row not written": Option("The rows of this call are still zero.", WITH_LSE),
            "one slot early": Option(
                "The new rows overwrite the last cached one; the last slot is zero.", WITH_LSE
            ),
            "position off by one": Option("The new token turns by position + 1.", ("rope",)),
        },
        ("attention", "attention_lse", "rope"),
        "edge",
        "The slot of a new token is the number of cached ones.",
        "vllm-tt-plugin#103",
    ),
]
"""Conventions of this file."""
