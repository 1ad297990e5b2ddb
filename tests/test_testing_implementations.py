"""Correct implementations of others and of our own break no law; what each needs is said here.

torch, Transformers, JAX and onnx are used where they are installed.
"""

import numpy as np
import pytest
from seeds import run_seed

from npllm import ops, testing
from npllm.kernels import compiled_ops, tiled_ops, why_not_compiled
from npllm.testing.laws import check
from npllm.testing.laws.attention import FEATURES

SEED = run_seed()
EVERY = set(FEATURES) - {"poison"}
live = pytest.mark.live


def holds(op, fn, features=None, **options):
    """Check a function; the seed is in the message of a failure."""
    report = check(op, fn, features, max_examples=options.pop("n", 25), seed=SEED, **options)
    assert report.used <= 1
    assert report.n_undecided <= report.n_trial / 3
    return report


# ------------------------------------------------------------------ our own


def row_major(q, k, v, **options):
    return ops.blockwise_attention(q, k, v, block_q=7, block_k=5, **options)


def key_major(q, k, v, **options):
    return ops.blockwise_attention(q, k, v, block_q=16, block_k=16, outer="keys", **options)


@pytest.mark.parametrize("fn", [row_major, key_major])
def test_both_schedules_of_blockwise_attention(fn):
    features = EVERY if fn is row_major else EVERY - {"lse"}
    holds("attention", fn, features)


def made(make):
    """A set of kernels; without Numba there is one less."""
    ops_ = make()
    if ops_ is None:
        pytest.skip(why_not_compiled())
    return ops_


@pytest.mark.parametrize("make", [tiled_ops, compiled_ops])
@pytest.mark.parametrize("op", ["attention", "apply_rope", "rms_norm", "linear", "swiglu", "embed"])
def test_the_sets_of_kernels_for_the_cpu(make, op):
    fn = getattr(made(make), op)
    holds(op, fn, EVERY if op == "attention" else {"bias"} if op == "linear" else None)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiled_ops, compiled_ops])
@pytest.mark.parametrize("op", ["attention", "apply_rope", "rms_norm", "linear", "swiglu"])
def test_the_sets_of_kernels_in_1000_examples(make, op):
    holds(op, getattr(made(make), op), EVERY if op == "attention" else None, n=1000)


# ------------------------------------------------------------------ torch, Transformers


def sdpa(q, k, v, mask, scale):
    torch = pytest.importorskip("torch")
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )


def torch_rms_norm(x, weight, eps):
    torch = pytest.importorskip("torch")
    norm = torch.nn.RMSNorm(x.shape[-1], eps=eps)
    norm.weight.data = weight
    with torch.no_grad():
        return norm(x)


def eager(q, k, v, mask, scale):
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")

    class Module:
        training, num_key_value_groups = False, q.shape[1] // k.shape[1]

    y, _ = phi3.eager_attention_forward(Module, q, k, v, mask, scaling=scale)
    return y.transpose(1, 2)


def transformers_rope(x, cos, sin):
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    cos, sin = (t[None] if t.ndim == 2 else t for t in (cos, sin))
    return phi3.apply_rotary_pos_emb(x, x, cos, sin)[0]


@live
@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_torch_attention(mask):
    pytest.importorskip("torch")
    report = holds("attention", testing.adapt(sdpa, "attention", library="torch", mask=mask))
    assert ("bias" in report.features) == (mask == "additive")


@live
def test_torch_rms_norm():
    pytest.importorskip("torch")
    holds("rms_norm", testing.adapt(torch_rms_norm, "rms_norm", library="torch"))


@live
def test_transformers_rope():
    pytest.importorskip("transformers")
    holds("apply_rope", testing.adapt(transformers_rope, "apply_rope", library="torch"))


@live
def test_transformers_eager_attention_but_for_rows_without_keys():
    """Those give the mean of all values: convention C11."""
    pytest.importorskip("transformers")
    fn = testing.adapt(eager, "attention", library="torch", mask="additive", allow_nan=True)
    holds("attention", fn, fn.npllm_features - {"empty rows"})
    with pytest.raises(testing.LawBroken):
        holds("attention", fn)


# ------------------------------------------------------------------ JAX


def jax_attention(q, k, v, mask, scale):
    jax = pytest.importorskip("jax")
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)


@live
@pytest.mark.slow
def test_jax_attention_but_for_rows_without_keys():
    """Those give the mean of all values: convention C11.  Subnormal numbers count as zero."""
    pytest.importorskip("jax")
    fn = testing.adapt(jax_attention, "attention", library="jax", layout="b n h d")
    sizes = {"gqa", "window", "padding", "cache", "slots", "scale"}
    holds("attention", fn, sizes, flush_to_zero=True)  # on the CPU, XLA's code does that


# ------------------------------------------------------------------ onnx's reference operations


def onnx_function(name, n_input, dtype=np.float32, **attributes):
    """An operation of onnx's reference evaluator as a function of NumPy arrays."""
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    names = [f"x{n}" for n in range(n_input)]
    node = onnx.helper.make_node(name, names, ["y"], **attributes)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        name,
        [onnx.helper.make_tensor_value_info(x, kind, None) for x in names],
        [onnx.helper.make_tensor_value_info("y", kind, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    session = reference.ReferenceEvaluator(model)

    def call(*arrays):
        found = session.run(None, dict(zip(names, arrays, strict=True)))[0]
        return np.asarray(found, dtype=dtype)

    return call


@live
def test_onnx_attention_but_for_rows_without_keys():
    """Its additive mask makes NaN of a row that sees no key: convention C11."""
    pytest.importorskip("onnx")

    def mine(q, k, v, mask, scale):
        return onnx_function("Attention", 4, scale=scale)(q, k, v, mask)

    fn = testing.adapt(mine, "attention", library="numpy", mask="additive", allow_nan=True)
    holds("attention", fn, fn.npllm_features - {"empty rows"})


@live
def test_onnx_rms_norm():
    pytest.importorskip("onnx")

    def mine(x, weight, eps):
        return onnx_function("RMSNormalization", 2, epsilon=eps)(x, weight)

    holds("rms_norm", mine)


@live
def test_onnx_rotary_embedding():
    """Its tables hold each angle once."""
    pytest.importorskip("onnx")

    def mine(x, cos, sin):
        half = cos.shape[-1] // 2
        tables = [np.broadcast_to(t[..., :half], (len(x), x.shape[2], half)) for t in (cos, sin)]
        width = {"rotary_embedding_dim": 2 * half} if 2 * half < x.shape[-1] else {}
        return onnx_function("RotaryEmbedding", 3, **width)(x, *tables)

    holds("apply_rope", mine)
