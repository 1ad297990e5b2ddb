"""Conventions of positions: rotary embedding, LongRoPE, padding and packing."""

from npllm.testing.registry.convention import Convention, Option

__all__ = ["ENTRIES"]

ROPE = ("rope",)

ENTRIES = [
    Convention(
        "C1",
        "RoPE pairing",
        {
            "half-split": Option("Channel i turns with channel i + d_rope/2 (NeoX, Transformers)."),
            "interleaved": Option(
                "Channel 2i turns with channel 2i + 1 (GPT-J, GGUF's llama).", ROPE
            ),
        },
        ROPE,
        "algebraic",
        "Channel i turns with channel i + d_rope/2.",
        "lattice#96",
    ),
    Convention(
        "C2",
        "RoPE phase dtype",
        {
            "float32": Option("Positions, frequencies and phases are float32."),
            "float64": Option(
                "Phases are float64; cos and sin are rounded afterwards.", ROPE, "rounding"
            ),
            "bfloat16 positions": Option("Positions are bfloat16: 15962 becomes 15936.", ROPE),
            "float16 positions": Option(
                "Positions are float16: 15962 becomes 15960, and 65520 infinity.", ROPE
            ),
            "bfloat16 throughout": Option("Positions, frequencies and phases are bfloat16.", ROPE),
        },
        ROPE,
        "algebraic",
        "Phases are computed in float32, whatever the dtype of the model.",
        "candle#3520",
    ),
    Convention(
        "C3",
        "LongRoPE factor choice",
        {
            "by sequence length": Option(
                "The long factors, where the largest position + 1 exceeds the original context."
            ),
            "always long": Option(
                "The long factors at every length, as engines do that go by a large context.", ROPE
            ),
            "always short": Option(
                "The short factors at every length, as engines do that go by a small context.", ROPE
            ),
            "by cache offset": Option("The length is taken without the tokens of this call.", ROPE),
            "ignored": Option("The frequencies are those of the base, without factors.", ROPE),
        },
        ROPE,
        "algebraic",
        "The length of the sequence chooses the factors, for all its positions.",
        "llama.cpp#24823",
    ),
    Convention(
        "C4",
        "LongRoPE magnitude",
        {
            "on cos and sin": Option(
                "cos and sin are multiplied by the magnitude; the rest of the head is not."
            ),
            "omitted": Option("Nothing is multiplied by the magnitude.", ROPE),
            "on q and k": Option(
                "The whole head is multiplied, its unrotated channels included.", ROPE
            ),
        },
        ROPE,
        "algebraic",
        "The magnitude scales cos and sin.",
        "vllm#48621",
    ),
    Convention(
        "C5",
        "Rotary fraction",
        {
            "partial": Option("The first d_rope channels turn (partial_rotary_factor)."),
            "full": Option("All channels turn, with frequencies spread over the whole head.", ROPE),
            "exponents over d_head": Option(
                "d_rope channels turn, with the exponents 2i / d_head.", ROPE
            ),
        },
        ROPE,
        "algebraic",
        "The first d_head * partial_rotary_factor channels turn.",
        "cascadia#69",
    ),
    Convention(
        "C18",
        "Positions under left padding",
        {
            "from the mask": Option("The first real token has position 0."),
            "column index": Option("A token's position is its column, padding counted.", ROPE),
        },
        ROPE,
        "algebraic",
        "Positions count real tokens. A shift changes q and k, and no score.",
        "unsloth#3699",
    ),
    Convention(
        "C19",
        "Packing",
        {
            "documents apart": Option(
                "A query sees its own document; positions start again in each."
            ),
            "no document mask": Option(
                "Only positions start again; queries see the other documents.", ("attention",)
            ),
            "positions run on": Option(
                "Only the mask separates; positions run on. Harmless for the scores under RoPE.",
                ROPE,
            ),
        },
        ("attention", "rope"),
        "algebraic",
        "The document mask separates packed documents.",
        "nanoVLM#204",
    ),
    Convention(
        "C25",
        "RoPE base",
        {
            "from config": Option("The base is rope_theta of config.json."),
            "10000": Option("The base is a hard-coded 10000.", ROPE),
        },
        ROPE,
        "algebraic",
        "The base comes from config.json.",
        "vllm#56066",
    ),
    Convention(
        "C26",
        "RoPE table layout",
        {
            "one layout": Option("The table and the rotation have one layout."),
            "interleaved table, half-split rotation": Option(
                "Column c holds angle c // 2; channel i turns with i + d_rope/2.", ROPE
            ),
            "half-split table, interleaved rotation": Option(
                "Column c holds angle c mod d_rope/2; 2i turns with 2i + 1.", ROPE
            ),
        },
        ROPE,
        "algebraic",
        "The table is laid out as the rotation reads it.",
        "how-to-train-your-gpt#7",
    ),
    Convention(
        "C27",
        "RoPE direction",
        {
            "+sin": Option("y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin."),
            "-sin": Option(
                "The sign of sin is turned: consistent in itself, fatal for trained weights.", ROPE
            ),
        },
        ROPE,
        "algebraic",
        "q cos + rotate_half(q) sin, rotate_half(x1, x2) = (-x2, x1).",
        "nanochat#489",
    ),
    Convention(
        "C34",
        "Partner channel under partial rotation",
        {
            "i + d_rope/2": Option("The partner lies half the rotated width further."),
            "i + d_head/2": Option("The partner lies half the head further.", ROPE),
        },
        ROPE,
        "algebraic",
        "The partner of channel i is i + d_rope/2.",
        "cascadia#69",
    ),
]
"""Conventions of this file."""
