"""`compare`: where another implementation departs from the answer, and why."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npllm.tracing.comparison.comparison import Comparison

__all__ = ["compare"]


def compare(
    mine: Any, gold: Any, *, weights: Any = None, model: Any = None, names: Any = "transformers"
) -> "Comparison":
    """Find where a run departs from the right one, and say which operation is wrong.

    Parameters
    ----------
    mine : Trace, mapping of str to array, golden bundle, str or Path
        What the implementation under test computed, under npllm's names
        (`npllm.models.taps.NAMES`), or under those that `names` says.  Some of the values are
        enough.  A path is a trace, .npz, .npy or safetensors files, or the text that
        llama-eval-callback printed.  Without an index of its own it has the steps of `gold`.
    gold : Trace, mapping of str to array, golden bundle, str or Path
        The right values, best in float64: `npllm.trace(model, prompt, dtype="float64")`, or
        `npllm.testing.golden("gqa")`.
    weights : mapping of str to array, str or Path, optional
        The parameters of the implementation under test, which are looked at first.
    model : Model, str or Path, optional
        Whose weights made the gold.  Default: the one that the gold's index names.
    names : str or Path
        What the values of `mine` are called: "transformers", "gguf", "mlx_lm",
        "transformer_lens", or a file like those in npllm/tracing/readers/names.

    Returns
    -------
    comparison : Comparison

    Raises
    ------
    NpllmOSError
        For a file that cannot be read.
    NpllmValueError, NpllmTypeError
        For an index that contradicts itself, or nothing in common.

    Notes
    -----
    Every operation is evaluated in float64 on the inputs that the implementation itself recorded,
    so that an error is counted where it arises: docs/compare.md.
    """
    from npllm.tracing.comparison.compare_runs import compare_runs  # not before it is needed

    return compare_runs(mine, gold, weights, model, names)
