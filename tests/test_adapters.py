"""LoRA adapters of a model: values against a float64 oracle, switching, merging, caches."""

import copy
import pickle

import lora
import numpy as np
import oracles
import pytest
import tiny
from close import close

import npllm
from npllm import ops
from npllm.adapters import adapted_params
from npllm.errors import NpllmKeyError, NpllmValueError

CONFIG = tiny.CONFIG
IDS = tiny.random_ids(2, 9)
ALL = (*lora.FUSED, "embed_tokens", "lm_head")
SETS = ("reference", "blockwise", "fast")
every_set = pytest.mark.parametrize("name", SETS)


@pytest.fixture
def folder(tmp_path):
    return lora.write_adapter(tmp_path / "a", lora.factors(CONFIG))


def adapted(folder, name="reference", **changes):
    model = tiny.model(ops=name, **changes)
    model.load_adapter(folder)
    return model


def merged_by_hand(tensors, scale, seed=0, dtype=np.float32):
    """The weights of tiny's model plus scale * B A in float64, rounded to dtype: name -> array."""
    weights = tiny.weights(seed=seed, dtype=dtype)
    for name, a in tensors.items():
        if "lora_A" in name or "embedding_A" in name:
            b = tensors[name.replace("_A", "_B")]
            delta = oracles.f64(b) @ oracles.f64(a)
            delta = delta.T if "embedding" in name else delta
            module = name.removeprefix("base_model.model.").partition(".lora")[0]
            weights[f"{module}.weight"] = oracles.f64(weights[f"{module}.weight"]) + scale * delta
    return {name: x.astype(dtype) for name, x in weights.items()}


def model_of(tmp_path, tensors, name="reference"):
    """A model whose checkpoint holds these weights."""
    return npllm.load(tiny.write_folder(tmp_path / "merged", tensors=tensors), ops=name)


# ------------------------------------------------------------------------------------------ values


def test_the_operation_is_the_formula():
    rng = np.random.default_rng(0)
    x, w, a, b, bias = (rng.standard_normal(s) for s in ((3, 8), (5, 8), (2, 8), (5, 2), (5,)))
    want = oracles.linear(x, w, bias) + 1.5 * oracles.linear(oracles.linear(x, a), b)
    close(ops.lora_linear(x, w, a, b, 1.5, bias), want)


@every_set
def test_logits_are_those_of_merged_weights(name, tmp_path):
    tensors = lora.factors(CONFIG, ALL, rank=5)
    folder = lora.write_adapter(tmp_path / "a", tensors, ALL, r=5, lora_alpha=10)
    want = model_of(tmp_path, merged_by_hand(tensors, 10 / 5), name)(IDS)
    close(adapted(folder, name)(IDS), want, times=4)


def test_float64_against_merged_weights_in_float64(tmp_path):
    tensors = lora.factors(CONFIG, ALL)
    folder = lora.write_adapter(tmp_path / "a", tensors, ALL)
    want = model_of(tmp_path, merged_by_hand(tensors, 2, dtype=np.float64))(IDS)
    close(adapted(folder, dtype=np.float64)(IDS), want, times=4)


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({"lora_alpha": 12}, 3.0),
        ({"lora_alpha": 12, "use_rslora": True}, 6.0),
        ({"alpha_pattern": {r"layers.0.*\.o_proj": 12, "o_proj": 12}}, 3.0),
        ({"lora_alpha": ...}, 2.0),
    ],
)
def test_alpha_and_rslora(settings, scale, tmp_path):
    tensors = lora.factors(CONFIG, ["o_proj"])
    folder = lora.write_adapter(tmp_path / "a", tensors, ["o_proj"], **settings)
    want = model_of(tmp_path, merged_by_hand(tensors, scale))(IDS)
    close(adapted(folder)(IDS), want, times=4)


def test_rank_pattern(tmp_path):
    tensors = lora.factors(CONFIG, rank=lambda leaf, layer: 3 if leaf == "o_proj" and layer else 4)
    pattern = {"1.self_attn.o_proj": 3}
    folder = lora.write_adapter(tmp_path / "a", tensors, rank_pattern=pattern, lora_alpha=4)
    model = adapted(folder)
    scales = [layer.o_proj.updates[0].scale for layer in model.params.layers]
    assert scales == [1, 4 / 3]


@every_set
def test_split_and_fused_names_of_one_content_agree(name, folder, tmp_path):
    tensors = lora.split_of(CONFIG, lora.factors(CONFIG))
    split = lora.write_adapter(tmp_path / "split", tensors, lora.SPLIT)
    close(adapted(split, name)(IDS), adapted(folder, name)(IDS))


def test_some_parts_of_a_fused_weight(tmp_path):
    whole = lora.split_of(CONFIG, lora.factors(CONFIG))
    leaves = ["k_proj", "up_proj"]
    tensors = {n: x for n, x in whole.items() if any(f".{leaf}." in n for leaf in leaves)}
    folder = lora.write_adapter(tmp_path / "a", tensors, leaves)
    zeroed = {n: x if n in tensors else 0 * x for n, x in whole.items()}
    other = lora.write_adapter(tmp_path / "b", zeroed, lora.SPLIT)
    want, got = adapted(other)(IDS), adapted(folder)(IDS)
    close(got, want, times=0)
    assert not np.array_equal(got, tiny.model(ops="reference")(IDS))


def test_layers_to_transform(tmp_path):
    tensors = lora.factors(CONFIG, layers=[1])
    folder = lora.write_adapter(tmp_path / "a", tensors, layers_to_transform=[1])
    model = adapted(folder)
    assert isinstance(model.params.layers[0].o_proj, np.ndarray)
    close(model(IDS), model_of(tmp_path, merged_by_hand(tensors, 2))(IDS), times=4)


@pytest.mark.parametrize("target", ["all-linear", r"model\.layers\.\d+\.(mlp|self_attn)\..*_proj"])
def test_targets_by_expression(target, folder, tmp_path):
    other = lora.write_adapter(tmp_path / "b", lora.factors(CONFIG), target_modules=target)
    close(adapted(other)(IDS), adapted(folder)(IDS), times=0)


def test_modules_to_save_take_the_place_of_the_weights(tmp_path):
    tensors = lora.factors(CONFIG)
    other = tiny.weights(seed=1)
    saved = {n: other[f"{n}.weight"] for n in ("model.embed_tokens", "lm_head", "model.norm")}
    file = tensors | {f"base_model.model.{n}.weight": x for n, x in saved.items()}
    names = ["embed_tokens", "lm_head", "model.norm"]
    folder = lora.write_adapter(tmp_path / "a", file, modules_to_save=names)
    weights = merged_by_hand(tensors, 2) | {f"{n}.weight": x for n, x in saved.items()}
    close(adapted(folder)(IDS), model_of(tmp_path, weights)(IDS), times=4)


# ----------------------------------------------------------------------------------------- switches


@every_set
def test_b_of_zeros_changes_no_bit(name, tmp_path):
    zeros = {n: 0 * x if "_B" in n else x for n, x in lora.factors(CONFIG, ALL).items()}
    folder = lora.write_adapter(tmp_path / "a", zeros, ALL)
    model = adapted(folder, name)
    close(model(IDS), tiny.model(ops=name)(IDS), times=0)
    assert model.adapter == "a"


@every_set
def test_switching_back_gives_the_same_bits(name, folder, tmp_path):
    model = tiny.model(ops=name)
    base = model(IDS)
    second = lora.write_adapter(tmp_path / "b", lora.factors(CONFIG, seed=1))
    assert [model.load_adapter(x) for x in (folder, second)] == ["a", "b"]
    seen = {}
    for adapter in (None, "a", "b", "a", None, "b"):
        model.set_adapter(adapter)
        close(model(IDS), seen.setdefault(adapter, model(IDS)), times=0)
    close(seen[None], base, times=0)
    assert np.abs(seen["a"] - seen["b"]).max() > 0.1
    assert model.adapters == ("a", "b")


@every_set
def test_merged_equals_unmerged(name, folder):
    model = adapted(folder, name)
    merged = model.merge_adapter()
    assert merged.adapter is None and merged.adapters == ()
    assert type(merged.params.layers[0].qkv_proj) is np.ndarray
    close(merged(IDS), model(IDS), times=4)
    assert merged.params.embed_tokens is model.params.embed_tokens


def test_merging_rounds_to_the_dtype_of_the_weights(folder, tmp_path):
    path = tiny.write_folder(tmp_path / "m", dtype=tiny.DTYPES["BF16"])
    model = npllm.load(path, ops="reference", adapter=folder)
    wide = model.params.layers[0].o_proj.widened()
    merged = model.merge_adapter().params.layers[0].o_proj
    assert wide.dtype == np.float32 and merged.dtype == tiny.DTYPES["BF16"]
    close(merged, wide.astype(merged.dtype), times=0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_run_unmerged_and_refuse_to_merge(dtype, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    config = CONFIG | sizes
    path = tiny.write_folder(tmp_path / "m", **sizes)
    other = lora.write_adapter(tmp_path / "b", lora.factors(config))
    exact = {"dtype": dtype, "adapter": other, "activations": "float32"}
    model = npllm.load(path, ops="reference", **exact)
    got, params = model(IDS), model.params
    wide = model.base_params
    model = npllm.load(path, ops="fast", **exact)
    close(model(IDS), got, times=4)
    assert params.layers[0].o_proj.base is wide.layers[0].o_proj
    with pytest.raises(NpllmValueError, match=r"qkv_proj: a weight stored as .*dtype=\"bfloat16\""):
        model.merge_adapter()


@every_set
def test_a_cache_gives_what_recomputing_gives(name, folder):
    model = adapted(folder, name)
    cache = model.new_cache(2)
    steps = [model(IDS[:, :5], cache=cache)] + [
        model(IDS[:, i : i + 1], cache=cache) for i in range(5, 9)
    ]
    close(np.concatenate(steps, axis=1), model(IDS), times=4)


@pytest.mark.parametrize("leaves", [lora.FUSED, ("k_proj", "up_proj", "down_proj"), ("o_proj",)])
def test_a_row_has_the_same_bits_alone_and_in_company(leaves, tmp_path):
    tensors = lora.factors(CONFIG, leaves, rank=3)
    model = adapted(lora.write_adapter(tmp_path / "a", tensors, leaves, r=3), "fast")
    if model.ops.name != "compiled":
        pytest.skip("a promise of the compiled set")
    ids = tiny.random_ids(5, 5)

    def decoded(rows):
        cache = model.new_cache(len(rows))
        model(rows[:, :3], cache=cache)
        return np.concatenate([model(rows[:, n : n + 1], cache=cache) for n in (3, 4)], axis=1)

    alone = np.concatenate([decoded(ids[row : row + 1]) for row in range(5)])
    close(decoded(ids), alone, times=0)
    close(alone, adapted(tmp_path / "a")(ids)[:, 3:], times=8)


def test_the_kernels_of_half_a_layer_run(folder):
    model = adapted(folder, "fast")
    if model.ops.name != "compiled":
        pytest.skip("kernels of the compiled set")
    taken = []
    for name in ("attention_block", "mlp_block"):
        kernel = getattr(model.ops, name)

        def counted(x, layer, step, kernel=kernel):
            y = kernel(x, layer, step)
            taken.append(y is not NotImplemented)
            return y

        model = model.on(model.ops.replace(**{name: counted}))
    cache = model.new_cache(2)
    model(IDS[:, :1], cache=cache)
    assert taken == [True] * (2 * CONFIG["num_hidden_layers"])


def test_a_cache_does_not_survive_a_switch(folder):
    model = tiny.model()
    cache = model.new_cache(2)
    model(IDS[:, :4], cache=cache)
    model.load_adapter(folder)
    with pytest.raises(NpllmValueError, match="another adapter"):
        model(IDS[:, 4:], cache=cache)
    with pytest.raises(NpllmValueError, match="another adapter"):
        model.generate(IDS, cache=cache, max_new_tokens=1)
    model.set_adapter(None)
    close(model(IDS[:, 4:], cache=cache), model(IDS)[:, 4:], times=4)


def test_a_saved_cache_belongs_to_its_adapter(folder, tmp_path):
    model = adapted(folder)
    cache = model.new_cache(2)
    model(IDS[:, :4], cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    same = adapted(folder).load_cache(tmp_path / "cache.safetensors")
    close(adapted(folder)(IDS, cache=None)[:, :1], model(IDS)[:, :1], times=0)
    assert same.n_ctx == 4
    other = lora.write_adapter(tmp_path / "b", lora.factors(CONFIG), lora_alpha=9)
    for wrong in (tiny.model(ops="reference"), adapted(other)):
        with pytest.raises(NpllmValueError, match="another adapter"):
            wrong.load_cache(tmp_path / "cache.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_cache_of_quantised_weights_can_be_saved(dtype, tmp_path):
    path = tiny.write_folder(tmp_path / "m", hidden_size=64, intermediate_size=64)
    model = npllm.load(path, dtype=dtype, ops="reference")
    cache = model.new_cache(2)
    model(IDS, cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    assert model.load_cache(tmp_path / "cache.safetensors").n_ctx == IDS.shape[1]
    with pytest.raises(NpllmValueError, match="other weights"):
        npllm.load(path, ops="reference").load_cache(tmp_path / "cache.safetensors")


# ----------------------------------------------------------------------------- copies, taps, words


def test_copies_have_the_adapter(folder):
    model = adapted(folder)
    want = model(IDS)
    others = [
        pickle.loads(pickle.dumps(model)),
        copy.copy(model),
        copy.deepcopy(model),
        model.with_mask(ops.mask.causal()),
        model.on("reference"),
    ]
    for other in others:
        close(other(IDS), want, times=0)
        assert other.adapters == ("a",) and other.adapter == "a"
        other.set_adapter(None)
    close(model(IDS), want, times=0)


def test_a_model_of_a_folder_is_pickled_with_its_adapter(folder, tmp_path):
    path = tiny.write_folder(tmp_path / "m")
    model = npllm.load(path, ops="reference", adapter=folder)
    content = pickle.dumps(model)
    assert b"embed_tokens" not in content
    other = pickle.loads(content)
    close(other(IDS), model(IDS), times=0)
    other.set_adapter(None)
    close(other(IDS), tiny.model(ops="reference")(IDS), times=0)


def test_a_replaced_linear_sees_base_and_factors(folder):
    shapes = []

    def mine(x, weight, bias=None):
        shapes.append(type(weight) is np.ndarray)
        return ops.linear(x, weight, bias)

    model = adapted(folder, "fast")
    want = model(IDS)
    close(model.with_ops(linear=mine)(IDS), want, times=4)
    n_layer = CONFIG["num_hidden_layers"]
    assert len(shapes) == 4 * 3 * n_layer + 1 and all(shapes)


def test_taps_see_the_sum(folder):
    model, seen = adapted(folder, "fast"), {}
    want = model(IDS)
    got = model(IDS, tap=lambda name, x: seen.setdefault(name, x))
    close(got, want, times=4)
    layer = model.params.layers[0]
    h = seen["model.layers.0.input_layernorm"]
    weight = layer.qkv_proj.widened()
    close(seen["model.layers.0.self_attn.qkv_proj"], ops.linear(h, weight), times=4)


def test_repr_and_trace_name_the_adapter(folder):
    model = adapted(folder)
    assert "adapter a" in repr(model)
    assert npllm.trace(model, IDS).index["adapter"] == "a"
    definitions = npllm.trace(model, IDS, dtype="float64")
    close(definitions["lm_head"].astype(np.float32), model(IDS), times=4)
    model.set_adapter(None)
    assert "adapter" not in repr(model)
    with pytest.raises(NpllmValueError, match="the adapter is a in the gold, None"):
        npllm.compare(definitions, definitions, model=model)


def test_compare_takes_the_adapted_model(folder):
    model = adapted(folder)
    gold = npllm.trace(model, IDS, dtype="float64")
    assert npllm.compare(npllm.trace(model, IDS), gold, model=model).status == "same"


def test_generate_and_score_run_under_the_adapter(folder):
    model = adapted(folder, "fast")
    merged = model.merge_adapter()
    made = [x.generate(IDS, max_new_tokens=4, do_sample=False) for x in (model, merged)]
    assert np.array_equal(*made)


def test_names_are_checked(folder):
    model = adapted(folder)
    with pytest.raises(NpllmKeyError, match="no adapter is called 'b'; loaded: a"):
        model.set_adapter("b")
    with pytest.raises(NpllmValueError, match="'a' is loaded already"):
        model.load_adapter(folder)
    assert model.load_adapter(folder, name="again") == "again"
    model.set_adapter(None)
    with pytest.raises(NpllmValueError, match="needs an active adapter"):
        model.merge_adapter()


def test_layers_are_shared_with_the_base(folder):
    model = adapted(folder)
    base = model.base_params
    again = adapted_params(base, model._adapters["a"].adapter)
    assert again.layers[0].qkv_proj.base is base.layers[0].qkv_proj
    assert again.norm is base.norm
