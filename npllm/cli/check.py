"""The command `npllm check`: a function of the user's against every law of its operation."""

import time
from collections.abc import Callable
from typing import Any

import click

from npllm.cli.options import refuse_without
from npllm.cli.streams import print_json, usage_errors
from npllm.errors import NpllmValueError
from npllm.testing.naming import CHECKED, function_named, op_in

__all__ = ["COMMANDS"]

WRONG, UNDECIDED = 1, 3

LIBRARIES = ("numpy", "torch", "jax", "cupy", "dlpack", "array_api_strict")
MASKS = ("rule", "bool", "inverted", "additive", "none")


@click.command()
@click.argument("function", metavar="MODULE:FUNCTION")
@click.option(
    "--op", type=click.Choice(CHECKED), help="Check this operation. [from the function's name]"
)
@click.option(
    "--library",
    type=click.Choice(LIBRARIES),
    help="Name the library of its arrays; without it, it has the signature of npllm.ops.",
)
@click.option(
    "--layout",
    default="b h n d",
    show_default=True,
    help="Name the axes of q, k, v and the result.",
)
@click.option(
    "--mask",
    type=click.Choice(MASKS[1:]),
    default="bool",
    show_default=True,
    help="Pass a mask of this kind to a function of another library.",
)
@click.option(
    "--dtype", default="float32", show_default=True, help="Check inputs and output of this type."
)
@click.option(
    "--flush-to-zero",
    is_flag=True,
    help="Let subnormal numbers count as zero, as with JAX on the CPU and CUDA's -ftz=true.",
)
@click.option("--features", metavar="A,B", help="Check only these. [all that the function takes]")
@click.option(
    "--max-examples",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Make at most so many inputs.",
)
@click.option(
    "--n-seq",
    type=click.IntRange(min=0),
    default=2000,
    show_default=True,
    help="Give the large problem of an attention so many tokens; 0: leave it out.",
)
@click.option("--seed", type=int, help="Search as every run with this seed does.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def check(context: click.Context, function: str, as_json: bool, **options: Any) -> None:
    """Check FUNCTION of MODULE against every law of an operation.

    Prints a table, then the verdict, then what to do.  Exit codes: 0 no law is broken, 1 one is, 2
    usage, 3 not decidable.
    """
    if options["library"] is None:
        refuse_without("it goes with --library", "layout", "mask")
    with usage_errors():
        facts = checked(function, **options)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(lines_of(facts)))
    context.exit({"right": 0, "wrong": WRONG, "not decidable": UNDECIDED}[facts["verdict"]])


def checked(
    function: str,
    *,
    op: str | None,
    library: str | None,
    layout: str,
    mask: str,
    dtype: str,
    flush_to_zero: bool,
    features: str | None,
    max_examples: int,
    n_seq: int,
    seed: int | None,
) -> dict[str, Any]:
    """Run the checks of a function; return what is printed, as a dict of what JSON holds."""
    from npllm.testing import adapt

    fn = function_named(function)
    op = op or op_in(function)
    if library is not None:
        fn = adapt(fn, op, library=library, layout=layout, mask=mask)
    asked = None if features is None else {name for name in features.split(",") if name}
    facts: dict[str, Any] = {"function": function, "op": op, "rows": []}
    arithmetic = {"flush_to_zero": True} if flush_to_zero else {}
    if flush_to_zero and op == "decoder":
        raise NpllmValueError("--flush-to-zero has no meaning for --op decoder: leave it out")
    error = _add_laws(facts, op, fn, asked, max_examples, dtype, seed, arithmetic)
    if op == "attention" and n_seq and error is None:
        _add_large(facts, fn, n_seq, dtype)
    states = [row["status"] for row in facts["rows"]]
    facts["verdict"] = next((s for s in ("wrong", "not decidable") if s in states), "right")
    facts["to_do"] = _to_do(facts, error)
    return facts


# ------------------------------------------------------------------ the rows of the table


def _add_laws(
    facts: dict[str, Any],
    op: str,
    fn: Callable,
    features: set[str] | None,
    max_examples: int,
    dtype: str,
    seed: int | None,
    arithmetic: dict[str, Any],
) -> Any:
    """Search for a case that breaks a law; return the failure, or None."""
    from npllm import testing

    began = time.perf_counter()
    row: dict[str, Any] = {"what": f"laws, up to {max_examples} examples"}
    facts["rows"].append(row)
    try:
        if op == "decoder":
            seen = testing.check_decoder(fn, features, max_examples, seed=seed)
        else:
            extra = arithmetic | ({"kind": "draws"} if op == "sampler" else {})
            seen = testing.check(
                op, fn, features, max_examples=max_examples, dtype=dtype, seed=seed, **extra
            )
    except testing.LawBroken as error:
        row |= {"status": "wrong", "calls": None, "used": error.used}
        row["seconds"] = time.perf_counter() - began
        facts["failure"] = str(error)
        facts["replay"] = error.replay
        return error
    is_vague = seen.n_undecided * 2 > seen.n_trial
    row |= {"status": "not decidable" if is_vague else "right", "used": seen.used}
    row |= {"calls": seen.n_trial, "seconds": time.perf_counter() - began}
    facts |= {"seed": seen.seed, "features": list(seen.features)}
    facts["left_out"] = list(seen.left_out)
    return None


def _add_large(facts: dict[str, Any], fn: Callable, n_seq: int, dtype: str) -> None:
    """Judge one large causal attention: 8 query heads, 2 key/value heads, heads of 96."""
    import numpy as np

    from npllm.arrays import DTYPES
    from npllm.ops import mask
    from npllm.testing import verdict

    began, rng = time.perf_counter(), np.random.default_rng(0)
    n_kv_head = 2 if "gqa" in facts["features"] else 8
    q, k, v = (
        rng.standard_normal((1, heads, n_seq, 96)).astype(DTYPES[dtype])
        for heads in (8, n_kv_head, n_kv_head)
    )
    row: dict[str, Any] = {"what": f"{n_seq} tokens, 8 heads of 96", "calls": 1}
    facts["rows"].append(row)
    try:
        found = verdict("attention", {"q": q, "k": k, "v": v}, fn(q, k, v, mask=mask.causal()))
        used = found.used if np.isfinite(found.used) else None
        row |= {"status": "right" if found.status == "within" else found.status, "used": used}
        facts["large"] = str(found)
    except Exception as error:  # whatever the user's function raises
        row |= {"status": "wrong", "used": None}
        facts["large"] = f"it raised {type(error).__name__}: {error}"
    row["status"] = row["status"] if row["status"] in ("right", "wrong") else "not decidable"
    row["seconds"] = time.perf_counter() - began


def _to_do(facts: dict[str, Any], error: Any) -> list[str]:
    """Say what comes next."""
    from npllm.testing.arithmetic_models import FLUSHED, SUBNORMAL

    tiny_values = (FLUSHED, SUBNORMAL)
    if error is not None:
        names = error.diagnosis.names if error.diagnosis is not None else []
        steps = [f"mend {name}: see docs/conventions.md" for name in names]
        if error.diagnosis is not None and (error.diagnosis.model or "").endswith(tiny_values):
            steps.append("only values below 2**-126 are wrong: --flush-to-zero allows that")
        return [*steps, "run the smallest case again: the line behind replay"]
    if facts["verdict"] != "right":
        return ["look at where the large problem is wrong, and call npllm.testing.diagnose on it"]
    left_out = facts.get("left_out") or []
    if left_out:
        return [f"not tested: {', '.join(left_out)}; --features names what is"]
    return ["nothing"]


def lines_of(facts: dict[str, Any]) -> list[str]:
    """Lay the facts out for a person: a table, the verdict, what to do."""
    lines = [f"{'check':<32} {'calls':>6} {'of budget':>10} {'seconds':>8}  status"]
    for row in facts["rows"]:
        used = "-" if row["used"] is None else f"{row['used']:.3g}"
        calls = "-" if row["calls"] is None else row["calls"]
        lines.append(
            f"{row['what']:<32} {calls:>6} {used:>10} {row['seconds']:>8.1f}  {row['status']}"
        )
    lines += ["", f"verdict: {facts['op']} of {facts['function']} is {facts['verdict']}"]
    if "failure" in facts:
        lines += facts["failure"].splitlines()[1:]
    elif facts["verdict"] != "right":
        lines += facts.get("large", "").splitlines()
    return [*lines, "", *(f"to do: {step}" for step in facts["to_do"])]


COMMANDS = (check,)
"""What `npllm` registers."""
