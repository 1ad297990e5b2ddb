"""generation_config.json: how a checkpoint wants to be decoded.

Values are kept as the file has them and checked where they are used, so that a setting that one
kind of decoding cannot use does not hinder another one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npllm.config.config import Config
from npllm.config.regular_file import is_present
from npllm.config.strict_json import is_token, quote, read_json
from npllm.errors import NpllmValueError

__all__ = ["CONSTRAINTS", "FILTERS", "Constraints", "GenerationConfig", "Sampling"]

# Entries that would change the text and are not implemented, and the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "sequence_bias": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "forced_bos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
}
SAMPLING_ONLY = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # greedy and beams: unused
FILTERS = ("temperature", "top_k", "top_p", "min_p")
CONSTRAINTS = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_new_tokens",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily, or drawn after the filters.  None switches a filter
    off.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class Constraints:
    """Which tokens may not follow, or must: see `npllm.ops`, a function for each.  None: off."""

    no_repeat_ngram_size: int | None = None
    bad_words_ids: Any = None
    min_new_tokens: int | None = None
    forced_eos_token_id: Any = None
    suppress_tokens: Any = None
    begin_suppress_tokens: Any = None


@dataclass(frozen=True)
class GenerationConfig:
    """What generation_config.json says of a checkpoint.

    Attributes
    ----------
    eos_token_id : tuple of int
        Tokens that end an answer.
    pad_token_id : int or None
        Fills answers that ended early.
    sampling : Sampling
    unsupported : tuple of str
        "name=value" of each entry that is not implemented.
    constraints : Constraints
    num_beams, length_penalty, early_stopping, stop_strings
        As in the file; None: absent.
    source : str
        The file, for error messages.
    """

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    sampling: Sampling = Sampling()
    unsupported: tuple[str, ...] = ()
    constraints: Constraints = Constraints()
    num_beams: Any = None
    length_penalty: Any = None
    early_stopping: Any = None
    stop_strings: Any = None
    source: str = field(default="generation_config.json", compare=False)

    @classmethod
    def from_folder(cls, folder: str | Path, config: Config) -> "GenerationConfig":
        """Read generation_config.json; what it leaves out comes from config.json.

        Raises
        ------
        NpllmValueError
            When the stop ids or the pad id are no token ids.
        """
        path = Path(folder) / "generation_config.json"
        data = read_json(path) if is_present(path) else {}
        filters = {name: data.get(name) for name in (*FILTERS, "repetition_penalty")}
        return cls(
            _stop_ids(path, data.get("eos_token_id", list(config.eos_token_id))),
            _pad_id(path, data.get("pad_token_id", config.pad_token_id), config.vocab_size),
            Sampling(data.get("do_sample") or False, **filters),
            _unsupported(data),
            Constraints(**{name: data.get(name) for name in CONSTRAINTS}),
            data.get("num_beams"),
            data.get("length_penalty"),
            data.get("early_stopping"),
            data.get("stop_strings"),
            str(path),
        )

    @property
    def fill_id(self) -> int:
        """What fills answers that ended early: the pad id, else the first stop id, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return (self.eos_token_id or (0,))[0]

    def require_supported(self, do_sample: bool) -> None:
        """Raise where an entry that would change the text is not implemented.

        Raises
        ------
        NpllmValueError
            Naming the entries.
        """
        used = [
            entry
            for entry in self.unsupported
            if do_sample or entry.partition("=")[0] not in SAMPLING_ONLY
        ]
        if used:
            raise NpllmValueError(
                f"{self.source} asks for what is not implemented: {', '.join(used)}"
            )


def _stop_ids(path: Path, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(is_token, ids)):
        raise NpllmValueError(f"{path}: eos_token_id must be token ids, got {quote(value)}")
    return tuple(ids)


def _pad_id(path: Path, value: Any, n_vocab: int) -> int | None:
    if value is None or (value == -1 and not isinstance(value, bool | float)):
        return None
    if not is_token(value) or not value < n_vocab:
        raise NpllmValueError(
            f"{path}: pad_token_id must be a token id below vocab_size = {n_vocab}, "
            f"or -1 for none, got {quote(value)}"
        )
    return value


def _unsupported(data: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{name}={quote(data[name])}"
        for name, neutral in NEUTRAL.items()
        if data.get(name) not in (None, *neutral)
    )
