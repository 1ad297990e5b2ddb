"""Ops: a set of operations, the replacing of one, and what becomes of the slots that contain it."""

import inspect
import re
from collections import Counter
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import tiny
from close import close
from composed import Composed, definitions

import npllm
from npllm import kernels, ops
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models.params import LayerParams
from npllm.ops import Ops, blockwise, reference

NAMES, SLOTS = Ops.names(), ops.SLOTS
ARGUMENTS = (np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 1e-5, np.eye(2), np.array([0.5, 0.5]))
CALLS = {
    "norm_linear": ARGUMENTS,
    "norm_swiglu": (*ARGUMENTS[:3], np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([0.5, 0.25])),
    "linear_add": (ARGUMENTS[0], np.eye(2), np.array([[1.0, -1.0]]), np.array([0.5, 0.5])),
    "rope_attention": (
        np.arange(16.0).reshape(2, 8) / 8,
        *ops.rope_tables(np.arange(2), np.ones(1)),
        2,
        1,
    ),
    "attention_block": (
        np.array([[3.0, 4.0], [-1.0, 2.0]]),
        np.array([1.0, 2.0]),
        1e-5,
        np.arange(16.0).reshape(8, 2) / 8,
        np.arange(8.0).reshape(2, 4) / 4,
        *ops.rope_tables(np.arange(2), np.ones(1)),
        2,
        1,
        np.arange(8.0) / 2,
        np.array([0.5, -0.5]),
    ),
    "mlp_block": (
        *ARGUMENTS[:3],
        np.arange(12.0).reshape(6, 2) / 8,
        np.arange(6.0).reshape(2, 3) / 4,
        np.arange(6.0) / 2,
        np.array([0.5, -0.5]),
    ),
}
LAYER = LayerParams(
    *(CALLS["attention_block"][at] for at in (1, 3, 4)),
    *(CALLS["mlp_block"][at] for at in (1, 3, 4)),
    *CALLS["attention_block"][-2:],
    *CALLS["mlp_block"][-2:],
)
CALLS["decoder_layers"] = (
    CALLS["attention_block"][0],
    (LAYER,),
    1e-5,
    *CALLS["attention_block"][5:9],
)


def counting(set_of_ops, *names):
    """Wrap operations of a set in counters."""
    counts = Counter()

    def wrap(name):
        op = getattr(set_of_ops, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return counted

    return set_of_ops.replace(**{name: wrap(name) for name in names}), counts


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_set_holds_the_public_definitions(name):
    if name in SLOTS:
        assert getattr(reference, name) is getattr(blockwise, name) is None
        return
    assert getattr(reference, name) is getattr(ops, name)
    assert getattr(blockwise, name) is getattr(
        ops, "blockwise_attention" if name == "attention" else name
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_operation_is_the_one_that_runs_and_the_set_it_came_from_is_unchanged(name):
    def mine(*_):
        return "mine"

    before = getattr(reference, name)
    new = reference.replace(**{name: mine})
    assert getattr(new, name) is mine and getattr(reference, name) is before
    assert all(getattr(new, other) == getattr(reference, other) for other in NAMES if other != name)


def test_a_set_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        reference.linear = None


def test_a_name_that_no_operation_has_raises_and_lists_the_names():
    with pytest.raises(
        NpllmTypeError, match=r"no operation is called atention, nrom; an Ops has .*attention"
    ):
        reference.replace(atention=len, nrom=len, linear=len)


@pytest.mark.parametrize("value", [None, 3, "attention"])
def test_what_cannot_be_called_is_no_operation(value):
    with pytest.raises(NpllmTypeError, match=r"Ops.attention must be a function"):
        reference.replace(attention=value)
    with pytest.raises(NpllmTypeError, match=r"Ops.linear must be a function"):
        Ops(**{**{name: getattr(reference, name) for name in NAMES}, "linear": value})


def test_the_name_of_a_set_says_what_was_replaced():
    assert (
        reference.replace(linear=len, attention=len).name == "reference, replaced attention, linear"
    )
    assert reference.replace(linear=len, name="mine").name == "mine"


def closure(slot):
    """Every operation and slot that a slot contains, found by walking the table."""
    found, todo = set(), [slot]
    while todo:
        parts = SLOTS.get(todo.pop(), ())
        found.update(parts)
        todo.extend(parts)
    return found


@pytest.mark.parametrize("slot", SLOTS)
def test_the_parts_of_a_slot_are_all_that_it_is_made_of(slot):
    assert ops.parts_of(slot) == closure(slot)
    assert closure("decoder_layers") >= {
        "rms_norm",
        "linear",
        "apply_rope",
        "attention",
        "swiglu",
        "add",
    }


@pytest.mark.parametrize("slot", SLOTS)
def test_replacing_a_part_empties_every_slot_that_contains_it_and_no_other(slot):
    full = reference.replace(**{name: len for name in SLOTS})
    for part in NAMES:
        if part != slot:
            assert (getattr(full.replace(**{part: len}), slot) is None) == (
                part in closure(slot)
            ), part


def test_a_slot_that_declines_is_composed():
    declining = reference.replace(**{slot: lambda *_: NotImplemented for slot in SLOTS})
    for name, call in CALLS.items():
        close(getattr(Composed(declining), name)(*call), getattr(definitions, name)(*call), times=0)


def test_a_kernel_that_returns_none_is_named():
    with pytest.raises(
        NpllmTypeError, match="returned None; it must return an array, or NotImplemented"
    ):
        Composed(reference.replace(mlp_block=lambda *_: None)).mlp_block(*CALLS["mlp_block"])


def test_slots_equal_the_mathematics_written_out():
    x, gain, eps, weight, bias = CALLS["norm_swiglu"]
    row = (x / np.sqrt((x * x).mean() + eps) * gain) @ weight.T + bias
    close(
        definitions.norm_swiglu(*CALLS["norm_swiglu"]),
        row[:, :1] / (1 + np.exp(-row[:, :1])) * row[:, 1:],
    )
    x, weight, residual, bias = CALLS["linear_add"]
    close(definitions.linear_add(x, weight, residual, bias), residual + x @ weight.T + bias)
    qkv = CALLS["rope_attention"][0]
    q, k, v = qkv[:, :4].reshape(2, 2, 2), qkv[:, 4:6], qkv[:, 6:]
    turn = np.array([[[np.cos(n), -np.sin(n)], [np.sin(n), np.cos(n)]] for n in range(2)])
    q, k = np.einsum("nij,nhj->nhi", turn, q), np.einsum("nij,nj->ni", turn, k)
    weights = np.exp(np.einsum("nhi,mi->nhm", q, k) / np.sqrt(2))
    y = np.einsum("nhm,mi->nhi", weights / weights.sum(-1, keepdims=True), v)
    close(definitions.rope_attention(*CALLS["rope_attention"]), y.reshape(2, 4))


def test_half_blocks_equal_their_parts_written_out():
    x, gain, eps, qkv_weight, o_weight, cos, sin, *heads, qkv_bias, o_bias = CALLS[
        "attention_block"
    ]
    rows = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain
    attended = definitions.rope_attention(rows @ qkv_weight.T + qkv_bias, cos, sin, *heads)
    close(
        definitions.attention_block(*CALLS["attention_block"]), x + attended @ o_weight.T + o_bias
    )
    x, gain, eps, gate_up_weight, down_weight, gate_up_bias, down_bias = CALLS["mlp_block"]
    both = (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain @ gate_up_weight.T + gate_up_bias
    )
    gated = both[:, :3] / (1 + np.exp(-both[:, :3])) * both[:, 3:]
    close(definitions.mlp_block(*CALLS["mlp_block"]), x + gated @ down_weight.T + down_bias)


def test_the_layers_run_one_after_the_other_each_with_its_own_mask_and_place():
    x, (layer,), *rest = CALLS["decoder_layers"]
    other = layer._replace(qkv_proj=-layer.qkv_proj, down_proj=2 * layer.down_proj)
    want = x
    for params in (layer, other):
        want = definitions.attention_block(
            want,
            params.input_layernorm,
            rest[0],
            params.qkv_proj,
            params.o_proj,
            *rest[1:],
            params.qkv_bias,
            params.o_bias,
        )
        want = definitions.mlp_block(
            want,
            params.post_attention_layernorm,
            rest[0],
            params.gate_up_proj,
            params.down_proj,
            params.gate_up_bias,
            params.down_bias,
        )
    close(definitions.decoder_layers(x, (layer, other), *rest), want, times=0)
    seen = []
    spy = Composed(
        reference.replace(
            attention_block=lambda x, _, step: seen.append((step.mask, step.cache, step.layer)) or x
        )
    )
    spy.decoder_layers(x, (layer, other), *rest, masks=["first", "second"], cache="cache", layer=3)
    assert seen == [("first", "cache", 3), ("second", "cache", 4)]


def test_a_slot_stays_where_none_of_its_parts_is_replaced():
    full = reference.replace(norm_linear=len)
    assert full.replace(attention=len).norm_linear is len


def test_a_slot_given_beside_its_part_is_the_one_that_runs():
    assert reference.replace(linear=len, norm_linear=max).norm_linear is max


def test_parts_replaced_one_after_the_other_all_run():
    first, norms = counting(reference, "rms_norm")
    second, linears = counting(first, "linear")
    Composed(second.replace(attention=len)).norm_linear(*ARGUMENTS)
    assert norms["rms_norm"] == linears["linear"] == 1


def test_without_slots_what_was_replaced_is_kept():
    fast = kernels.fastest_ops()
    plain = fast.replace(norm_linear=len, swiglu=max).without_slots()
    assert plain.norm_linear is len and plain.swiglu is max and plain.linear is fast.linear
    assert all(getattr(plain, slot) is None for slot in SLOTS if slot != "norm_linear")


def test_the_blockwise_attention_takes_what_the_definition_takes():
    names = list(inspect.signature(ops.attention).parameters)
    assert list(inspect.signature(ops.blockwise_attention).parameters)[: len(names)] == names


def test_every_public_name_exists():
    assert sorted(set(ops.__all__)) == sorted(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


@pytest.mark.parametrize(
    ("name", "backend", "wanted"),
    [
        ("blockwise", "numpy", ops.blockwise),
        ("reference", "cupy", ops.reference),
        ("fast", "numpy", kernels.fastest_ops()),
        (None, "numpy", kernels.fastest_ops()),
        ("fast", "cupy", kernels.cuda_ops()),
        (None, "cupy", kernels.cuda_ops()),
        ("cuda", "cupy", kernels.cuda_ops()),
        (ops.reference, "cupy", ops.reference),
    ],
)
def test_a_set_is_chosen_by_name(name, backend, wanted):
    """The CUDA kernels are what runs on CuPy unless something else is asked for."""
    assert kernels.choose_ops(name, backend) is wanted


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", 'needs backend="cupy", got backend="numpy"'),
        ("quick", "one of fast, cuda, blockwise, reference, got 'quick'"),
    ],
)
def test_a_set_that_does_not_fit_is_named(name, said, tmp_path):
    for call in (
        lambda: kernels.choose_ops(name),
        lambda: npllm.load(tiny.write_folder(tmp_path / "a"), ops=name),
    ):
        with pytest.raises(NpllmValueError, match=re.escape(said)):
            call()
