"""`quantization_config` of config.json: what is read, what changes nothing, what is refused."""

import copy
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantised_folders import SCHEMES, Scheme, settings
from tiny import config_dict

from npllm import NpllmError
from npllm.config.config import Config
from npllm.config.quantization import FORMATS, Quantization
from npllm.errors import NpllmValueError

GPTQ, PACK = settings(Scheme()), settings(SCHEMES["pack asymmetric"])
WEIGHTS = ("config_groups", "group_0", "weights")


def read(content):
    return Config.from_json(config_dict(quantization_config=content)).quantization


def changed(content, path, value):
    """A copy with one value set, or left out where it is `...`."""
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def refused(content):
    with pytest.raises(NpllmValueError) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_is_read_without_a_warning(scheme):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read(settings(scheme))
    method = "gptq" if scheme.is_gptq else "compressed-tensors"
    assert found == Quantization(
        method,
        scheme.format,
        scheme.bits,
        scheme.group,
        scheme.symmetric,
        scheme.one_scale,
        has_order=scheme.is_gptq and scheme.act_order,
    )
    assert found.count_groups(100) == (1 if scheme.group is None else -(-100 // scheme.group))


def test_no_quantisation():
    assert read(None) is None and Config.from_json(config_dict()).quantization is None


@pytest.mark.parametrize(
    ("content", "path", "value", "field", "wanted"),
    [
        (GPTQ, ("checkpoint_format",), ..., "format", "gptq"),
        (GPTQ, ("sym",), ..., "is_symmetric", None),
        (GPTQ, ("dynamic",), {}, "n_bits", 4),
        (PACK, (*WEIGHTS, "num_bits"), ..., "n_bits", 8),
        (PACK, (*WEIGHTS, "symmetric"), ..., "is_symmetric", True),
        (PACK, (*WEIGHTS, "strategy"), ..., "group_size", 32),
        (PACK, ("config_groups", "group_0", "format"), ..., "format", "pack-quantized"),
        (PACK, ("format",), "mixed-precision", "format", "pack-quantized"),
        (PACK, ("sparsity_config",), {}, "n_bits", 4),
        (PACK, ("transform_config",), {}, "n_bits", 4),
    ],
)
def test_what_a_missing_or_idle_key_means(content, path, value, field, wanted):
    assert getattr(read(changed(content, path, value)), field) == wanted


@pytest.mark.parametrize(
    ("group_size", "wanted"), [(-1, (None, False)), (None, (None, True)), (64, (64, False))]
)
def test_the_size_of_groups_implies_the_strategy(group_size, wanted):
    content = changed(PACK, (*WEIGHTS, "strategy"), ...)
    found = read(changed(content, (*WEIGHTS, "group_size"), group_size))
    assert (found.group_size, found.has_one_scale) == wanted


def test_format_is_the_other_name_of_checkpoint_format():
    content = changed(GPTQ, ("checkpoint_format",), ...)
    assert read(content | {"format": "gptq_v2"}).format == "gptq_v2"


@pytest.mark.parametrize(
    "method", ["awq", "bitsandbytes", "fp8", "torchao", "hqq", "quanto", "auto-round", None, 5, {}]
)
def test_another_method_is_named_with_what_to_use(method):
    text = refused({"quant_method": method, "bits": 4})
    assert f"quant_method must be gptq or compressed-tensors, got {method!r}" in text
    assert 'dtype="int4"' in text and "GGUF" in text


@pytest.mark.parametrize(
    ("content", "path", "value", "key"),
    [
        (GPTQ, ("bits",), 5, "bits"),
        (GPTQ, ("bits",), "4", "bits"),
        (GPTQ, ("bits",), ..., "bits"),
        (GPTQ, ("group_size",), 0, "group_size"),
        (GPTQ, ("group_size",), -2, "group_size"),
        (GPTQ, ("group_size",), ..., "group_size"),
        (GPTQ, ("sym",), "yes", "sym"),
        (GPTQ, ("checkpoint_format",), "marlin", "checkpoint_format"),
        (GPTQ, ("checkpoint_format",), "bitblas", "checkpoint_format"),
        (GPTQ, ("checkpoint_format",), ["gptq"], "checkpoint_format"),
        (GPTQ, ("dynamic",), {"-:.*down.*": {}}, "dynamic"),
        (GPTQ, ("is_marlin_format",), True, "is_marlin_format"),
        (GPTQ, ("pack_dtype",), "int8", "pack_dtype"),
        (GPTQ, ("rotation",), "hadamard", "rotation"),
        (GPTQ, ("adapter",), {"name": "lora"}, "adapter"),
        (PACK, ("format",), ..., "format"),
        (PACK, ("format",), "float-quantized", "format"),
        (PACK, ("format",), "nvfp4-pack-quantized", "format"),
        (PACK, ("format",), "marlin-24", "format"),
        (PACK, ("config_groups",), {}, "config_groups"),
        (PACK, ("config_groups",), [1], "config_groups"),
        (PACK, ("config_groups", "group_0"), ["Linear"], "config_groups.group_0"),
        (PACK, WEIGHTS, None, "weights"),
        (PACK, (*WEIGHTS, "num_bits"), 6, "num_bits"),
        (PACK, (*WEIGHTS, "type"), "float", "type"),
        (PACK, (*WEIGHTS, "dynamic"), True, "dynamic"),
        (PACK, (*WEIGHTS, "strategy"), "block", "strategy"),
        (PACK, (*WEIGHTS, "strategy"), "channel", "group_size"),
        (PACK, (*WEIGHTS, "group_size"), None, "group_size"),
        (PACK, (*WEIGHTS, "block_structure"), [128, 128], "block_structure"),
        (PACK, ("config_groups", "group_0", "input_activations"), {"num_bits": 8}, "input_act"),
        (PACK, ("config_groups", "group_0", "output_activations"), {"num_bits": 8}, "output_act"),
        (PACK, ("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        (PACK, ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config"),
        (PACK, ("sparsity_config",), False, "sparsity_config"),
        (GPTQ, ("data_type",), "mx_fp", "data_type"),
        (PACK, ("transform_config",), {"config_groups": {"a": 1}}, "transform_config"),
    ],
)
def test_what_would_change_the_numbers_is_refused(content, path, value, key):
    if path == ("format",):
        content = changed(content, ("config_groups", "group_0", "format"), ...)
    text = refused(changed(content, path, value))
    assert text.startswith("config: quantization_config") and f"{key}" in text
    if key == path[-1] and value not in (..., None):
        assert repr(value)[:20] in text


def test_a_dense_sparsity_is_a_report():
    dense = {"format": "dense", "global_sparsity": 0.14, "sparsity_structure": "unstructured"}
    dense |= {"ignore": [], "registry_requires_subclass": False}
    assert read(PACK | {"sparsity_config": dense}) == read(PACK)


def test_compression_config_is_the_old_name():
    found = Config.from_json(config_dict(compression_config=PACK | {"version": "0.4"}))
    assert found.quantization == read(PACK)
    with pytest.raises(NpllmValueError, match="config: compression_config: quant_method must be"):
        Config.from_json(config_dict(compression_config={"quant_method": "x"}))


def test_what_autoround_writes_warns_of_nothing():
    given = {"data_type": "int", "provider": "auto-round", "iters": 200, "nsamples": 128}
    given |= {"amp": True, "scale_dtype": "torch.float16", "enable_quanted_input": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(GPTQ | given) == read(GPTQ)
        assert read(PACK | {"provider": "auto-round"}) == read(PACK)


def with_a_second_group(**changes):
    content = copy.deepcopy(PACK)
    second = copy.deepcopy(content["config_groups"]["group_0"])
    second["weights"] |= changes
    second["targets"] = ["re:.*down_proj"]
    content["config_groups"]["group_1"] = second
    return content


def test_groups_that_agree_are_one():
    assert read(with_a_second_group()) == read(PACK)


def test_groups_that_differ_are_refused():
    text = refused(with_a_second_group(num_bits=8))
    assert "group_1 must quantise as group_0 does" in text
    assert "of 8 bits" in text and "of 4 bits" in text


def test_an_unknown_key_warns_by_name():
    with pytest.warns(UserWarning, match="quantization_config: unknown keys are ignored: later"):
        read(GPTQ | {"later": 1})


def test_no_pattern_is_matched():
    """(a+)+$ takes exponential time on "aaaa...b"."""
    content = PACK | {"ignore": ["re:(.+)+$" * 20, "re:((.*)*)*x"]}
    start = time.perf_counter()
    assert read(content).n_bits == 4
    assert time.perf_counter() - start < 1


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
PLACES = [(GPTQ, (key,)) for key in [*GPTQ, "dynamic", "format"]]
PLACES += [(PACK, (key,)) for key in [*PACK, "sparsity_config"]]
PLACES += [(PACK, ("config_groups", "group_0", x)) for x in PACK["config_groups"]["group_0"]]
PLACES += [(PACK, (*WEIGHTS, x)) for x in PACK["config_groups"]["group_0"]["weights"]]


@given(place=st.sampled_from(PLACES), value=junk)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_stands_there_the_error_is_ours(place, value):
    content, path = place
    try:
        found = read(changed(content, path, value))
    except NpllmError as error:
        assert len(str(error)) < 1000
    else:
        assert found is None or found.format in FORMATS[found.method]
