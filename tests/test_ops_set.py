"""Ops: a set of operations, the replacing of one, and what becomes of the fusions that contain it."""

import inspect
import re
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import tiny
from close import close

import npllm
from npllm import kernels, ops
from npllm.errors import NpllmTypeError, NpllmValueError
from npllm.models.params import LayerParams
from npllm.ops import Ops, blockwise, reference

NAMES = [field.name for field in fields(Ops) if field.name != "name"]
FUSIONS = {fusion: parts for fusion, parts in ops.FUSIONS.items()}
ARGUMENTS = (np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 1e-5, np.eye(2), np.array([0.5, 0.5]))
CALLS = {"norm_linear": ARGUMENTS, "norm_swiglu": (*ARGUMENTS[:3], np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([0.5, 0.25])),
         "linear_add": (ARGUMENTS[0], np.eye(2), np.array([[1.0, -1.0]]), np.array([0.5, 0.5])),
         "rope_attention": (np.arange(16.0).reshape(2, 8) / 8, *ops.rope_tables(np.arange(2), np.ones(1)), 2, 1),
         "attention_block": (np.array([[3.0, 4.0], [-1.0, 2.0]]), np.array([1.0, 2.0]), 1e-5, np.arange(16.0).reshape(8, 2) / 8,
                             np.arange(8.0).reshape(2, 4) / 4, *ops.rope_tables(np.arange(2), np.ones(1)), 2, 1,
                             np.arange(8.0) / 2, np.array([0.5, -0.5])),
         "mlp_block": (*ARGUMENTS[:3], np.arange(12.0).reshape(6, 2) / 8, np.arange(6.0).reshape(2, 3) / 4, np.arange(6.0) / 2,
                       np.array([0.5, -0.5]))}
LAYER = LayerParams(*(CALLS["attention_block"][at] for at in (1, 3, 4)), *(CALLS["mlp_block"][at] for at in (1, 3, 4)),
                    *CALLS["attention_block"][-2:], *CALLS["mlp_block"][-2:])
CALLS["decoder_layers"] = (CALLS["attention_block"][0], (LAYER,), 1e-5, *CALLS["attention_block"][5:9])
TWICE = {("rope_attention", "apply_rope"), ("attention_block", "apply_rope"), ("attention_block", "linear"), ("mlp_block", "linear"),
         *(("decoder_layers", part) for part in ("rms_norm", "norm_linear", "apply_rope", "add", "linear_add"))}
FOUR_TIMES = {("decoder_layers", "linear")}


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
    if name not in FUSIONS:
        assert getattr(reference, name) is getattr(ops, name)
        assert getattr(blockwise, name) is getattr(ops, "blockwise_attention" if name == "attention" else name)
    assert callable(getattr(reference, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_operation_is_the_one_that_runs_and_the_set_it_came_from_is_unchanged(name):
    def mine(*_):
        return "mine"

    before = getattr(reference, name)
    new = reference.replace(**{name: mine})
    assert getattr(new, name) is mine and getattr(reference, name) is before
    assert all(getattr(new, other) == getattr(reference, other) for other in NAMES if other != name and other not in FUSIONS)


def test_a_set_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        reference.linear = None


def test_a_name_that_no_operation_has_raises_and_lists_the_names():
    with pytest.raises(NpllmTypeError, match=r"no operation is called atention, nrom; an Ops has .*attention"):
        reference.replace(atention=len, nrom=len, linear=len)


@pytest.mark.parametrize("value", [None, 3, "attention"])
def test_what_cannot_be_called_is_no_operation(value):
    with pytest.raises(NpllmTypeError, match=r"Ops.attention must be a function"):
        reference.replace(attention=value)
    with pytest.raises(NpllmTypeError, match=r"Ops.linear must be a function"):
        Ops(**{**{name: getattr(reference, name) for name in NAMES}, "linear": value})


def test_the_name_of_a_set_says_what_was_replaced():
    assert reference.replace(linear=len, attention=len).name == "reference, replaced attention, linear"
    assert reference.replace(linear=len, name="mine").name == "mine"


def test_fusions_equal_the_composition_of_their_parts():
    x, gain, eps, weight, bias = ARGUMENTS
    close(reference.norm_linear(*ARGUMENTS), ops.linear(ops.rms_norm(x, gain, eps), weight, bias), times=0)
    close(ops.norm_linear(*ARGUMENTS), reference.norm_linear(*ARGUMENTS), times=0)
    close(ops.norm_linear(*ARGUMENTS[:4]), ops.linear(ops.rms_norm(x, gain, eps), weight), times=0)


@pytest.mark.parametrize(("fusion", "part"), [(fusion, part) for fusion, parts in FUSIONS.items() for part in parts])
def test_a_fusion_of_a_replaced_part_runs_that_part(fusion, part):
    fused = reference.replace(**{fusion: lambda *_: "fused"})
    new, counts = counting(fused, part)
    close(getattr(new, fusion)(*CALLS[fusion]), getattr(ops, fusion)(*CALLS[fusion]), times=0)
    assert counts == {part: 4 if (fusion, part) in FOUR_TIMES else 2 if (fusion, part) in TWICE else 1}


def test_fusions_equal_the_mathematics_written_out():
    x, gain, eps, weight, bias = CALLS["norm_swiglu"]
    row = (x / np.sqrt((x * x).mean() + eps) * gain) @ weight.T + bias
    close(ops.norm_swiglu(*CALLS["norm_swiglu"]), row[:, :1] / (1 + np.exp(-row[:, :1])) * row[:, 1:])
    x, weight, residual, bias = CALLS["linear_add"]
    close(ops.linear_add(x, weight, residual, bias), residual + x @ weight.T + bias)
    qkv = CALLS["rope_attention"][0]
    q, k, v = qkv[:, :4].reshape(2, 2, 2), qkv[:, 4:6], qkv[:, 6:]
    turn = np.array([[[np.cos(n), -np.sin(n)], [np.sin(n), np.cos(n)]] for n in range(2)])
    q, k = np.einsum("nij,nhj->nhi", turn, q), np.einsum("nij,nj->ni", turn, k)
    weights = np.exp(np.einsum("nhi,mi->nhm", q, k) / np.sqrt(2))
    y = np.einsum("nhm,mi->nhi", weights / weights.sum(-1, keepdims=True), v)
    close(ops.rope_attention(*CALLS["rope_attention"]), y.reshape(2, 4))


def test_half_blocks_equal_their_parts_written_out():
    x, gain, eps, qkv_weight, o_weight, cos, sin, *heads, qkv_bias, o_bias = CALLS["attention_block"]
    rows = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain
    attended = ops.rope_attention(rows @ qkv_weight.T + qkv_bias, cos, sin, *heads)
    close(ops.attention_block(*CALLS["attention_block"]), x + attended @ o_weight.T + o_bias)
    x, gain, eps, gate_up_weight, down_weight, gate_up_bias, down_bias = CALLS["mlp_block"]
    both = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain @ gate_up_weight.T + gate_up_bias
    gated = both[:, :3] / (1 + np.exp(-both[:, :3])) * both[:, 3:]
    close(ops.mlp_block(*CALLS["mlp_block"]), x + gated @ down_weight.T + down_bias)


def test_the_attention_block_hands_on_mask_cache_and_layer():
    seen = {}
    spy = reference.replace(rope_attention=lambda qkv, *args, **options: seen.update(options) or ops.rope_attention(qkv, *args))
    spy.attention_block(*CALLS["attention_block"], mask="mask", cache="cache", layer=3)
    assert seen == {"mask": "mask", "cache": "cache", "layer": 3}


def test_the_layers_run_one_after_the_other_each_with_its_own_mask_and_place():
    x, (layer,), *rest = CALLS["decoder_layers"]
    other = layer._replace(qkv_proj=-layer.qkv_proj, down_proj=2 * layer.down_proj)
    want = x
    for params in (layer, other):
        want = ops.attention_block(want, params.input_layernorm, rest[0], params.qkv_proj, params.o_proj, *rest[1:], params.qkv_bias,
                                   params.o_bias)
        want = ops.mlp_block(want, params.post_attention_layernorm, rest[0], params.gate_up_proj, params.down_proj,
                             params.gate_up_bias, params.down_bias)
    close(ops.decoder_layers(x, (layer, other), *rest), want, times=0)
    seen = []
    spy = reference.replace(attention_block=lambda x, *_, **options: seen.append(options) or x)
    spy.decoder_layers(x, (layer, other), *rest, masks=["first", "second"], cache="cache", layer=3)
    assert seen == [{"mask": "first", "cache": "cache", "layer": 3}, {"mask": "second", "cache": "cache", "layer": 4}]


def test_masks_that_are_not_as_many_as_layers_are_refused():
    with pytest.raises(NpllmValueError, match="masks must hold one rule for each of 1 layers, got 2"):
        ops.decoder_layers(*CALLS["decoder_layers"], masks=[None, None])


def test_a_fusion_stays_where_none_of_its_parts_is_replaced():
    fused = reference.replace(norm_linear=lambda *_: "fused")
    assert fused.replace(attention=len).norm_linear(*ARGUMENTS) == "fused"
    assert fused.norm_linear(*ARGUMENTS) == "fused"


def test_a_fusion_given_beside_its_part_is_the_one_that_runs():
    new = reference.replace(linear=len, norm_linear=lambda *_: "fused")
    assert new.norm_linear(*ARGUMENTS) == "fused"


def test_parts_replaced_one_after_the_other_all_run():
    first, norms = counting(reference, "rms_norm")
    second, linears = counting(first, "linear")
    second.replace(attention=len).norm_linear(*ARGUMENTS)
    assert norms["rms_norm"] == linears["linear"] == 1


def test_an_unfused_set_runs_every_part_and_keeps_what_was_replaced():
    new, counts = counting(reference.replace(norm_linear=lambda *_: "fused", swiglu=len), "add")
    plain = new.unfused()
    close(plain.norm_linear(*ARGUMENTS), ops.norm_linear(*ARGUMENTS), times=0)
    assert plain.swiglu is len and plain.add is new.add and not counts


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_fusion_has_one_signature_everywhere(fusion):
    public = inspect.signature(getattr(ops, fusion))
    assert public == inspect.signature(getattr(reference, fusion)) == inspect.signature(getattr(blockwise, fusion))


def test_the_blockwise_attention_takes_what_the_definition_takes():
    names = list(inspect.signature(ops.attention).parameters)
    assert list(inspect.signature(ops.blockwise_attention).parameters)[: len(names)] == names


def test_every_public_name_exists():
    assert sorted(set(ops.__all__)) == sorted(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


def test_the_fusions_of_the_blockwise_set_hold_its_own_attention():
    qkv, cos, sin, *heads = CALLS["rope_attention"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["npllm.ops.attention"], "evaluate_mask", lambda *_: pytest.fail("the definition ran"))
        blockwise.rope_attention(qkv, cos, sin, *heads)


@pytest.mark.parametrize(("name", "backend", "wanted"), [
    ("blockwise", "numpy", ops.blockwise), ("reference", "cupy", ops.reference), ("fast", "numpy", kernels.fastest_ops()),
    (None, "numpy", kernels.fastest_ops()), ("fast", "cupy", kernels.cuda_ops()), (None, "cupy", kernels.cuda_ops()),
    ("cuda", "cupy", kernels.cuda_ops()), (ops.reference, "cupy", ops.reference)])
def test_a_set_is_chosen_by_name(name, backend, wanted):
    """The CUDA kernels are what runs on CuPy unless something else is asked for."""
    assert kernels.choose_ops(name, backend) is wanted


@pytest.mark.parametrize(("name", "said"), [("cuda", 'needs backend="cupy", got backend="numpy"'),
                                            ("quick", "one of fast, cuda, blockwise, reference, got 'quick'")])
def test_a_set_that_does_not_fit_is_named(name, said, tmp_path):
    for call in (lambda: kernels.choose_ops(name), lambda: npllm.load(tiny.write_folder(tmp_path / "a"), ops=name)):
        with pytest.raises(NpllmValueError, match=re.escape(said)):
            call()
