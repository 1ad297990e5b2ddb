"""`quantization_config` of a config.json: how the matrices of a checkpoint are quantised.

Which matrices are quantised is read from the names of the tensors: the lists of modules
(`targets`, `ignore`, `lm_head`, ...) say the same, and are not matched.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from npllm.config.reader import Reader
from npllm.config.strict_json import printable, quote
from npllm.errors import NpllmValueError

__all__ = ["BITS", "FORMATS", "Quantization", "parse_quantization"]

KEY = "quantization_config"
BITS = (2, 3, 4, 8)
FORMATS = {
    "gptq": ("gptq", "gptq_v2"),
    "compressed-tensors": ("pack-quantized", "int-quantized", "naive-quantized"),
}
"""quant_method -> the layouts of its tensors that are read."""
INSTEAD = (
    'load the original checkpoint with dtype="int4" or "int8" (--dtype), a GGUF file of this '
    "model, or one quantised by gptq or compressed-tensors"
)

NO_EFFECT = {
    "gptq": """
        desc_act static_groups act_group_aware true_sequential lm_head meta damp_percent
        damp_auto_increment model_name_or_path model_file_base_name tokenizer dataset batch_size
        block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize
        pad_token_id model_seqlen max_input_length cache_block_outputs backend use_exllama
        use_cuda_fp16 disable_exllama exllama_config quantizer mse fail_safe v2 v2_alpha hyb_act
        pack_impl parallel_packing offload_to_disk offload_to_disk_path failsafe gptaq foem
        format quant_method method iters autoround_version
        provider enable_quanted_input enable_minmax_tuning enable_norm_bias_tuning amp
        low_gpu_mem_usage gradient_accumulate_steps lr minmax_lr nsamples seqlen train_bs
        quant_block_list to_quant_block_names scale_dtype
    """,
    "compressed-tensors": """
        ignore global_compression_ratio quantization_status run_compressed dequantize
        use_optimized_inference version format provider
    """,
    "group": "targets",
    "weights": "actorder observer observer_kwargs scale_dtype zp_dtype",
}
"""Keys that say how the checkpoint was made or run, and not what its tensors mean."""
NO_EFFECT_KEYS = {name: frozenset(keys.split()) for name, keys in NO_EFFECT.items()}

# Keys that may be present only with a value that changes nothing.
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "dynamic": (None, {}),
        "is_marlin_format": (False, None),
        "pack_dtype": ("int32", None),
        "planar": (False, None),
        "rotation": (None, ""),
        "adapter": (None,),
        "quant_config": (None,),
        "data_type": ("int", None),
    },
    "compressed-tensors": {
        "kv_cache_scheme": (None,),
        "transform_config": (None, {}),
        "moe_sparsity_config": (None,),
    },
    "group": {"input_activations": (None,), "output_activations": (None,)},
    "weights": {"type": ("int", None), "dynamic": (False, None), "block_structure": (None,)},
}


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a checkpoint are quantised.

        w[o, i] = scale[o, g] * (q[o, i] - z[o, g]),   g the group of column i

    Parameters
    ----------
    method : str
        "gptq" or "compressed-tensors".
    format : str
        Layout of the tensors, one of `FORMATS`.
    n_bits : int
        Of q and z.
    group_size : int or None
        Columns of a group; None: a row is one group.
    is_symmetric : bool or None
        z is 2**(n_bits - 1) everywhere; None where the file does not say.
    has_one_scale : bool
        One scale, and one z, for the whole matrix.
    has_order : bool
        Groups are of columns that need not be adjacent, so that the file must say which.
    """

    method: str
    format: str
    n_bits: int
    group_size: int | None = None
    is_symmetric: bool | None = None
    has_one_scale: bool = False
    has_order: bool = False

    def count_groups(self, d_in: int) -> int:
        """Count the groups of a row, the last of which may be shorter."""
        return 1 if self.group_size is None else -(-d_in // self.group_size)


def parse_quantization(read: Reader) -> Quantization | None:
    """Read `quantization_config`; None where the checkpoint is not quantised.

    Parameters
    ----------
    read : Reader
        Of a config.json.

    Returns
    -------
    quantization : Quantization or None

    Raises
    ------
    NpllmValueError
        For a method, a layout or a value that is not implemented; names key and value.

    Notes
    -----
    Source: `GPTQConfig` in Transformers 5.23, `QuantizeConfig` in GPTQModel; `QuantizationConfig`,
    `QuantizationScheme` and `QuantizationArgs` in compressed-tensors 0.20.
    """
    old = "compression_config"  # in files of the first versions of compressed-tensors
    key = old if read.get(KEY) is None and old in read.data else KEY
    value = read.get(key)
    if value is None:
        return None
    where = f"{read.where}: {key}"
    if not isinstance(value, dict):
        raise NpllmValueError(f"{where} must be an object or null, got {quote(value)}")
    inner = Reader(value, where)
    method = inner.get("quant_method")
    if method == "gptq":
        return _parse_gptq(inner)
    if method == "compressed-tensors":
        return _parse_compressed(inner)
    raise NpllmValueError(
        f"{where}: quant_method must be {' or '.join(FORMATS)}, got {quote(method)}, which is not "
        f"implemented; {INSTEAD}"
    )


def _parse_gptq(read: Reader) -> Quantization:
    """Read what GPTQModel, AutoGPTQ and Optimum write."""
    layout = read.get("checkpoint_format", read.get("format", "gptq"))
    if layout not in FORMATS["gptq"]:
        _refuse(read, "checkpoint_format", "gptq or gptq_v2", layout)
    is_symmetric = None if read.get("sym") is None else read.flag("sym", True)
    size = None if read.get("group_size") == -1 else read.size("group_size")
    has_order = read.get("desc_act") not in (None, False) and size is not None
    n_bits = _bits(read, "bits")
    _finish(read, "gptq")
    return Quantization("gptq", layout, n_bits, size, is_symmetric, has_order=has_order)


def _parse_compressed(read: Reader) -> Quantization:
    """Read what llm-compressor writes: schemes of groups of modules, which must agree."""
    layout, groups = read.get("format"), read.get("config_groups")
    sparsity = read.get("sparsity_config", {})
    if sparsity != {} and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        _refuse(read, "sparsity_config", "null, empty or of format dense", sparsity)
    if not isinstance(groups, dict) or not groups:
        _refuse(read, "config_groups", "an object with at least one group", groups)
    found = {}
    for name, group in groups.items():
        where = f"{read.where}.config_groups.{printable(name[:40])}"
        if not isinstance(group, dict):
            raise NpllmValueError(f"{where} must be an object, got {quote(group)}")
        found[where] = _parse_group(Reader(group, where), layout)
    _finish(read, "compressed-tensors")
    first, *others = found.items()
    for where, scheme in others:
        if scheme != first[1]:
            raise NpllmValueError(
                f"{where} must quantise as {first[0].rsplit('.', 1)[-1]} does (groups of modules "
                f"that differ are not implemented), got {_words(scheme)} and {_words(first[1])}; "
                f"{INSTEAD}"
            )
    return first[1]


def _parse_group(read: Reader, layout: Any) -> Quantization:
    """Read the scheme of a group of modules."""
    layout = read.get("format", layout)
    if layout not in FORMATS["compressed-tensors"]:
        _refuse(read, "format", " or ".join(FORMATS["compressed-tensors"]), layout)
    weights = read.get("weights")
    if not isinstance(weights, dict):
        _refuse(read, "weights", "an object", weights)
    _finish(read, "group")
    return _parse_weights(Reader(weights, f"{read.where}.weights"), layout)


def _parse_weights(read: Reader, layout: str) -> Quantization:
    """Read bits, groups and zero points of a group of modules."""
    _finish(read, "weights", is_last=False)
    n_bits = _bits(read, "num_bits", 8)
    size = None if read.get("group_size") == -1 else read.optional_size("group_size")
    implied = "group" if size else "tensor" if read.get("group_size") is None else "channel"
    strategy = read.get("strategy", implied)
    if strategy not in ("group", "channel", "tensor"):
        _refuse(read, "strategy", "group, channel or tensor", strategy)
    if (strategy == "group") != (size is not None):
        wanted = "an integer of at least 1" if strategy == "group" else "null or -1"
        _refuse(read, "group_size", f"{wanted} for strategy {strategy}", read.get("group_size"))
    is_symmetric, has_order = read.flag("symmetric", True), read.get("actorder") == "group"
    _finish(read, "weights")
    return Quantization(
        "compressed-tensors", layout, n_bits, size, is_symmetric, strategy == "tensor", has_order
    )


def _bits(read: Reader, key: str, default: int | None = None) -> int:
    """Read the bits of a code."""
    n_bits = read.size(key, default)
    if n_bits not in BITS:
        _refuse(read, key, f"one of {', '.join(map(str, BITS))}", n_bits)
    return n_bits


def _finish(read: Reader, kind: str, *, is_last: bool = True) -> None:
    """Raise for values that are not implemented; at last warn of unknown keys."""
    for key, allowed in ONLY.get(kind, {}).items():
        if read.get(key) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            _refuse(read, key, wanted, read.data[key])
    if is_last:
        read.finish({}, NO_EFFECT_KEYS[kind])


def _refuse(read: Reader, key: str, wanted: str, value: Any) -> NoReturn:
    raise NpllmValueError(
        f"{read.where}: {key} must be {wanted} (anything else is not implemented), "
        f"got {quote(value)}; {INSTEAD}"
    )


def _words(scheme: Quantization) -> str:
    """Describe a scheme in a few words."""
    size = "tensor" if scheme.has_one_scale else scheme.group_size or "row"
    kind = "symmetric" if scheme.is_symmetric else "asymmetric"
    return f"{scheme.format} of {scheme.n_bits} bits, {kind}, groups: {size}"
