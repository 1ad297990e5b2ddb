"""Conventions of the operations on rows: fused weights, norm, accumulation, layout, embedding."""

from npllm.testing.registry.convention import Convention, Option

__all__ = ["ENTRIES"]

NORM = ("rms_norm",)
SUMS = ("linear", "rms_norm")

ENTRIES = [
    Convention(
        "C6",
        "Rows of the fused q, k, v",
        {
            "blocks": Option("All query rows, then all key rows, then all value rows."),
            "per-head interleave": Option(
                "For each key/value head: its query rows, its key rows, its value rows.",
                ("qkv_projection",),
            ),
        },
        ("qkv_projection",),
        "algebraic",
        "The rows are q, k, v blocks, head by head inside each.",
        "sglang#24321",
    ),
    Convention(
        "C7",
        "Rows of the fused gate and up",
        {
            "gate first": Option("The first half is the gate."),
            "up first": Option("The second half is the gate.", ("swiglu",)),
            "interleaved": Option("Gate and up alternate.", ("swiglu",)),
        },
        ("swiglu",),
        "algebraic",
        "Gate rows come first, then up rows.",
        "mlx-lm#767",
    ),
    Convention(
        "C13",
        "Where RMSNorm casts",
        {
            "cast before weight": Option(
                "The normalised row is rounded to the model dtype, then multiplied by the gain.",
                NORM,
            ),
            "cast after weight": Option(
                "The gain is applied in float32; one rounding at the end.", NORM
            ),
            "variance of the rounded sum": Option(
                "A fused add and norm takes the statistic of the rounded sum; no single "
                "operation shows it."
            ),
        },
        NORM,
        "rounding",
        "float32 inside, rounded before the gain; npllm's own definition rounds once, after it.",
        "TransformerEngine#1132",
    ),
    Convention(
        "C28",
        "Gain of the norm",
        {
            "w": Option("The normalised row is multiplied by w."),
            "1 + w": Option("The gain is 1 + w (Gemma).", NORM),
            "twice": Option("The gain is applied twice.", NORM),
            "omitted": Option("There is no gain.", NORM),
        },
        NORM,
        "algebraic",
        "The gain is w.",
        "mold#1078",
    ),
    Convention(
        "C29",
        "Statistic of the norm, and eps",
        {
            "mean of squares": Option("sqrt(mean x**2 + eps), eps from config.json."),
            "sum of squares": Option("The sum is not divided by d_model.", NORM),
            "centred": Option("The mean is subtracted first, as in LayerNorm.", NORM),
            "eps 1e-6": Option("eps is a hard-coded 1e-6.", NORM),
            "eps 1e-5": Option("eps is a hard-coded 1e-5.", NORM),
            "eps omitted": Option("There is no eps.", NORM),
            "eps outside the root": Option("sqrt(mean x**2) + eps.", NORM),
        },
        NORM,
        "algebraic",
        "Mean of squares, eps from config.json inside the root.",
        "transformers#48762, tt-xla#5209",
    ),
    Convention(
        "C30",
        "Accumulation",
        {
            "float32": Option("Sums are float32.", SUMS),
            "storage dtype": Option(
                "Sums are rounded to the dtype of the output after each term.", SUMS
            ),
            "bfloat16 accumulator": Option("Sums are rounded to bfloat16 after each term.", SUMS),
            "float16 accumulator": Option("Sums are rounded to float16 after each term.", SUMS),
        },
        SUMS,
        "rounding",
        "Sums are at least float32.",
        "mlir-air#1679",
    ),
    Convention(
        "C31",
        "Strides and layout",
        {
            "as documented": Option(
                "[n_head, n_seq, d_head]; weights [d_out, d_in]; strides respected."
            ),
            "inputs position-major": Option(
                "Buffers [n_seq, n_head, d] are read as [n_head, n_seq, d].", ("attention",)
            ),
            "output position-major": Option(
                "The output is written [n_seq, n_head, d] and read as [n_head, n_seq, d].",
                ("attention",),
            ),
            "weight [d_in, d_out]": Option(
                "The weight's buffer is read as [d_in, d_out].", ("linear", "qkv_projection")
            ),
            "heads not moved": Option(
                "[n_seq, n_head, d_head] is read as [n_head, n_seq, d_head].", ("qkv_projection",)
            ),
        },
        ("attention", "linear", "qkv_projection"),
        "algebraic",
        "Layouts are those of the documentation.",
        "FlagGems#5896",
    ),
    Convention(
        "C33",
        "Tied head, embedding scale",
        {
            "as config says": Option(
                "The head is its own matrix unless tied; the embedding is not scaled."
            ),
            "times sqrt(d_model)": Option(
                "The embedding is multiplied by sqrt(d_model) (Gemma, the 2017 paper).", ("embed",)
            ),
            "tied": Option("The embedding table serves as head.", ("lm_head",)),
        },
        ("embed", "lm_head"),
        "algebraic",
        "tie_word_embeddings decides; embeddings are not scaled.",
        "mold#1078",
    ),
]
"""Conventions of this file."""
