"""The rope parameters of a config.json: both spellings, and the values that each type allows.

What a number means is documented with the function that uses it, in `npllm.ops.frequencies`.
"""

from dataclasses import dataclass

from npllm.config import legacy_names
from npllm.config.reader import Reader
from npllm.config.strict_json import LARGEST_SIZE, quote, require
from npllm.errors import NpllmValueError
from npllm.progress import warn

__all__ = ["ROPE_TYPES", "RopeParameters", "parse_rope", "validate_rope"]

ROPE_TYPES = {
    "phi3": ("default", "longrope"),
    "llama": ("default", "linear", "dynamic", "yarn", "llama3", "longrope"),
}
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
POSITIVE = (
    "factor",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
)
NOT_NEGATIVE = ("mscale", "mscale_all_dim")
FACTORS = ("short_factor", "long_factor")
NOT_READ = ("short_mscale", "long_mscale")  # nor does Transformers read them
SMALLEST, LARGEST = 1e-9, 1e9  # of a factor


@dataclass(frozen=True)
class RopeParameters:
    """How positions become angles: `rope_parameters` of config.json.

    Older files have `rope_scaling` and `rope_theta` in its place.  None: not in the file.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def context_length(self, max_position_embeddings: int) -> int:
        """Return the most tokens of a sequence; the factor of dynamic RoPE multiplies them."""
        factor = self.factor if self.rope_type == "dynamic" else None
        return int(max_position_embeddings * (1 if factor is None else factor))


def parse_rope(read: Reader, model_type: str) -> tuple[RopeParameters, int | None]:
    """Read the rope parameters in either spelling.

    Parameters
    ----------
    read : Reader
        Of the whole config.json.
    model_type : str
        "phi3" or "llama".

    Returns
    -------
    parameters : RopeParameters
    n_original : int or None
        The context length of the first training; None: not in the file.

    Raises
    ------
    NpllmValueError
        For a value of the wrong type.

    Notes
    -----
    `rope_scaling` has priority over `rope_parameters`, nested values over those at top level, and
    the context length at top level over the nested one.

    Source: `PreTrainedConfig.standardize_rope_params` in Transformers 5.23.
    """
    nested = read.get("rope_parameters") or {}
    nested = read.get("rope_scaling") or nested
    if not isinstance(nested, dict):
        raise NpllmValueError(
            f"{read.where}: rope_scaling must be null or an object, got {quote(nested)}"
        )
    rope = Reader(nested, f"{read.where}: rope_parameters")
    theta = read.number("rope_theta", 10000.0)
    fraction = read.number("partial_rotary_factor", 1.0)
    n_original = read.optional_size("original_max_position_embeddings")
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    fraction = _rotated_fraction(rope, rope_type, fraction, model_type)
    parameters = _parse_nested(rope, rope_type, theta, fraction, model_type)
    nested_original = rope.optional_size("original_max_position_embeddings")
    rope.finish({}, NOT_READ)
    return parameters, n_original or nested_original


def _parse_nested(
    rope: Reader, rope_type: str, theta: float, fraction: float, model_type: str
) -> RopeParameters:
    """Read the nested object; `theta` and `fraction` are the values at top level."""
    # For Llama, yarn is a type of its own.
    aliases = legacy_names.ROPE_TYPES if model_type == "phi3" else {}
    return RopeParameters(
        rope_type=aliases.get(rope_type, rope_type),
        rope_theta=rope.number("rope_theta", theta),
        partial_rotary_factor=fraction,
        truncate=rope.flag("truncate", True),
        short_factor=rope.optional_numbers("short_factor"),
        long_factor=rope.optional_numbers("long_factor"),
        **{name: rope.optional_number(name) for name in POSITIVE + NOT_NEGATIVE},
    )


def _rotated_fraction(rope: Reader, rope_type: str, fraction: float, model_type: str) -> float:
    """Read partial_rotary_factor; Llama's default RoPE rotates whole heads, as in Transformers."""
    fraction = rope.number("partial_rotary_factor", fraction)
    if model_type == "llama" and rope_type == "default" and fraction != 1:
        warn(
            f"{rope.where}: partial_rotary_factor = {fraction} has no effect with model_type llama "
            "and rope_type default: whole heads are rotated, as in Transformers"
        )
        return 1.0
    return fraction


def validate_rope(
    rope: RopeParameters,
    where: str,
    *,
    model_type: str,
    d_head: int,
    d_rope: int,
    n_original: int,
    max_position_embeddings: int,
) -> None:
    """Check the rope parameters against their type and against the width of a head.

    Parameters
    ----------
    rope : RopeParameters
    where : str
        Name of the source, for error messages.
    model_type : str
    d_head, d_rope : int
        Width of a head, and of its rotated part.
    n_original, max_position_embeddings : int
        Context length of the first training, and of the model.

    Raises
    ------
    NpllmValueError
        Names the value and what it must be.
    """
    types = ROPE_TYPES[model_type]
    require(
        where,
        rope.rope_type in types,
        f"rope_type must be one of {', '.join(types)}, got "
        f"{rope.rope_type!r}, which is not implemented",
    )
    require(
        where,
        model_type != "llama" or d_rope == d_head,
        f"partial_rotary_factor must be 1 for model_type llama and rope_type {rope.rope_type}, "
        f"got {rope.partial_rotary_factor}; Transformers cannot compute it either",
    )
    require(
        where,
        1 < rope.rope_theta < 1e30,
        f"rope_theta must be above 1 and below 1e30, got {rope.rope_theta}",
    )
    require(
        where,
        2 <= d_rope <= d_head and d_rope % 2 == 0,
        f"head_dim * partial_rotary_factor must be even and in 2 ... head_dim = {d_head}, "
        f"got {d_head} * {rope.partial_rotary_factor} = {d_rope}",
    )
    _validate_numbers(rope, where, d_rope)
    context_length = rope.context_length(max_position_embeddings)
    _validate_type(rope, where, d_rope, n_original, context_length)


def _validate_numbers(rope: RopeParameters, where: str, d_rope: int) -> None:
    """Check that the numbers that the type needs are present, and the range of every number."""
    for name in ROPE_NEEDS[rope.rope_type]:
        require(
            where,
            getattr(rope, name) is not None,
            f"rope_type {rope.rope_type} needs {name}, which is missing",
        )
    for name in POSITIVE:
        value = getattr(rope, name)
        require(
            where,
            value is None or _is_factor(value),
            f"{name} must be above 1e-9 and below 1e9, got {value}",
        )
    for name in NOT_NEGATIVE:
        value = getattr(rope, name)
        require(
            where,
            value is None or 0 <= value < LARGEST,
            f"{name} must be at least 0 and below 1e9, got {value}",
        )
    for name in FACTORS:
        factors = getattr(rope, name)
        fits = factors is None or (len(factors) == d_rope // 2 and all(map(_is_factor, factors)))
        require(
            where,
            fits,
            f"{name} must hold d_rope/2 = {d_rope // 2} positive numbers, got {len(factors or ())}",
        )


def _is_factor(value: float) -> bool:
    return SMALLEST < value < LARGEST


def _validate_type(
    rope: RopeParameters, where: str, d_rope: int, n_original: int, context_length: int
) -> None:
    """Check what one type of RoPE demands beyond the range of its numbers."""
    low, high, factor = rope.low_freq_factor, rope.high_freq_factor, rope.factor
    if rope.rope_type == "longrope":
        require(
            where,
            n_original > 1,
            "original_max_position_embeddings must be above 1 for longrope, got 1",
        )
    if rope.rope_type == "llama3" and low is not None and high is not None:
        require(
            where, high > low, f"high_freq_factor must be above low_freq_factor = {low}, got {high}"
        )
    if rope.rope_type == "dynamic" and factor is not None:
        require(
            where,
            d_rope >= 4 and factor >= 1,
            f"dynamic RoPE needs d_rope >= 4 and factor >= 1, got {d_rope} and {factor}",
        )
        require(
            where,
            context_length <= LARGEST_SIZE,
            f"max_position_embeddings * factor must be at most {LARGEST_SIZE}, "
            f"got {context_length}",
        )
