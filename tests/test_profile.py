"""The profile: what it counts is what the formulas of `npllm.analysis.cost` say, on sets with
kernels in their slots and without.
"""

import pytest
from tiny import model, random_ids

from npllm import kernels, ops
from npllm.analysis.cost import forward_cost, total
from npllm.analysis.profiling import profile, timed_ops
from npllm.errors import NpllmValueError

LIMITS = {"read": 1e10, "flops": 1e11}
SETS = [s for s in (ops.reference, ops.blockwise, kernels.tiled_ops(), kernels.compiled_ops()) if s]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("kind", SETS, ids=lambda s: s.name)
def test_the_operations_of_a_run_are_those_of_the_formula(kind, changes):
    m = model(ops=kind, **changes)
    facts = profile(m, n_prompt=7, n_new=3, repeat=1, limits=LIMITS)
    prefill = total(forward_cost(m.config, 7)).flops
    decode = sum(total(forward_cost(m.config, 1, n_past=n)).flops for n in (7, 8, 9)) / 3
    assert sum(row["flops"] for row in facts["prefill"]["ops"]) == prefill
    assert sum(row["flops"] for row in facts["decode"]["ops"]) == pytest.approx(decode, rel=1e-12)


def test_the_bytes_of_a_run_are_those_of_the_formula():
    m = model(ops=ops.reference)
    moved = sum(
        row["bytes"]
        for row in profile(m, n_prompt=7, n_new=1, repeat=1, limits=LIMITS)["prefill"]["ops"]
        if row["op"] != "add"
    )
    assert moved == total(forward_cost(m.config, 7, dtype="float32")).bytes


@pytest.mark.skipif(kernels.compiled_ops() is None, reason="Numba is not installed")
@pytest.mark.parametrize(("window", "n_seen"), [(None, 8), (4, 4)])
def test_a_fused_attention_reads_the_keys_and_values_that_are_seen(window, n_seen):
    m = model(ops=kernels.compiled_ops(), sliding_window=window)
    c = m.config
    rows = profile(m, n_prompt=7, n_new=1, repeat=1, limits=LIMITS)["decode"]["ops"]
    (row,) = [row for row in rows if row["op"] == "rope_attention"]
    d_q, d_kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    assert row["bytes"] == c.num_hidden_layers * 4 * (
        d_q + 2 * d_kv + d_q + 2 * c.d_rope + 2 * n_seen * d_kv
    )


@pytest.mark.parametrize(
    "sizes", [{"n_prompt": 0}, {"n_new": 0}, {"repeat": 0}, {"n_prompt": 10**6}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(NpllmValueError, match=r"at least 1|context length"):
        profile(model(), **{"n_prompt": 2, "n_new": 1, "repeat": 1, "limits": LIMITS} | sizes)


@pytest.mark.parametrize("kind", SETS, ids=lambda s: s.name)
def test_shares_and_limits_follow_from_what_was_measured(kind):
    facts = profile(model(ops=kind), n_prompt=5, n_new=2, repeat=2, limits=LIMITS)
    for phase in ("prefill", "decode"):
        part = facts[phase]
        assert sum(row["seconds"] for row in part["ops"]) + part[
            "between_seconds"
        ] == pytest.approx(part["seconds"])
        for row in part["ops"]:
            assert row["share"] == pytest.approx(row["seconds"] / part["seconds"])
            assert row["of_limit"] == pytest.approx(
                max(row["flops"] / 1e11, row["bytes"] / 1e10) / row["seconds"]
            )


def test_a_slot_with_a_kernel_stays_whole_and_an_empty_one_shows_its_parts():
    names = {}
    for kind in SETS:
        timed, calls = timed_ops(kind)
        model(ops=timed)(random_ids(1, 3))
        names[kind.name] = {op for op, _ in calls}
    assert names["reference"] == {
        "embed",
        "rope_tables",
        "rms_norm",
        "linear",
        "apply_rope",
        "attention",
        "swiglu",
        "add",
    }
    if "compiled" in names:
        assert names["compiled"] == {
            "embed",
            "rope_tables",
            "rms_norm",
            "norm_linear",
            "rope_attention",
            "linear_add",
            "norm_swiglu",
            "linear",
        }


def test_a_timed_set_changes_no_result():
    for kind in SETS:
        timed, _ = timed_ops(kind)
        ids = random_ids(2, 5)
        assert (model(ops=timed)(ids) == model(ops=kind)(ids)).all()
