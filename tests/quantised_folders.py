"""Tiny checkpoint folders as GPTQ and compressed-tensors write them, packed bit by bit, and the
folders of floats that compute the same function.
"""

from dataclasses import dataclass, replace

import numpy as np
import tiny

from npllm.checkpoints.phi3_layout import expected_shapes
from npllm.config.config import Config

FIELDS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sliding_window": ...}


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a folder are quantised."""

    format: str = "gptq"
    bits: int = 4
    group: int | None = 32  # columns; None: a row
    symmetric: bool = True
    act_order: bool = False
    scale: type = np.float16
    one_scale: bool = False
    head: bool = False  # lm_head is quantised as well

    @property
    def is_gptq(self):
        return self.format.startswith("gptq")

    def but(self, **changes):
        return replace(self, **changes)


SCHEMES = {
    "gptq": Scheme(),
    "gptq row": Scheme(group=None),
    "gptq 2 bits": Scheme(bits=2, head=True),
    "gptq 3 bits": Scheme(bits=3, symmetric=False),
    "gptq 8 bits": Scheme(bits=8),
    "gptq 8 bits asymmetric": Scheme(bits=8, symmetric=False),
    "gptq asymmetric": Scheme(symmetric=False),
    "gptq act-order": Scheme(act_order=True, head=True),
    "gptq act-order, groups of 16": Scheme(act_order=True, group=16, symmetric=False),
    "gptq bfloat16": Scheme(scale=tiny.DTYPES["BF16"]),
    "gptq_v2": Scheme("gptq_v2", symmetric=False),
    "pack": Scheme("pack-quantized", scale=tiny.DTYPES["BF16"]),
    "pack asymmetric": Scheme("pack-quantized", symmetric=False, head=True),
    "pack channel": Scheme("pack-quantized", group=None, symmetric=False),
    "pack tensor": Scheme("pack-quantized", group=None, one_scale=True, symmetric=False),
    "pack 8 bits": Scheme("pack-quantized", bits=8, head=True),
    "pack 3 bits": Scheme("pack-quantized", bits=3, scale=np.float32),
    "pack act-order": Scheme("pack-quantized", act_order=True),
    "int": Scheme("int-quantized", bits=8, group=None),
    "int tensor": Scheme("int-quantized", bits=8, group=None, one_scale=True),
    "int asymmetric": Scheme("int-quantized", bits=8, symmetric=False),
    "naive 4 bits": Scheme("naive-quantized", bits=4),
}


def settings(scheme):
    """The `quantization_config` of a scheme."""
    size = -1 if scheme.group is None else scheme.group
    if scheme.is_gptq:
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": size,
            "sym": scheme.symmetric,
            "desc_act": scheme.act_order,
            "checkpoint_format": scheme.format,
        }
    strategy = "tensor" if scheme.one_scale else "channel" if size == -1 else "group"
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    group["format"] = scheme.format  # where it is absent, the one of the whole counts
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "config_groups": {"group_0": group},
        "ignore": [] if scheme.head else ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def words_of(codes, bits):
    """Pack integers into 32-bit words: one long number, whose lowest bits are the first code."""
    number = 0
    for i, code in enumerate(codes):
        assert 0 <= code < 2**bits
        number |= int(code) << i * bits
    n_words = -(-len(codes) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * n_words, "little"), "<i4")


def packed_rows(codes, bits):
    return np.array([words_of(row, bits) for row in codes], np.int32)


def draw(rng, shape, scheme):
    """Codes, zero points, scales and the group of each column."""
    d_out, d_in = shape
    n_group = 1 if scheme.group is None else -(-d_in // scheme.group)
    codes = rng.integers(0, 2**scheme.bits, shape)
    zeros = np.full((d_out, n_group), 2 ** (scheme.bits - 1))
    if not scheme.symmetric:
        zeros = rng.integers(1, 2**scheme.bits, (d_out, n_group))
    scales = rng.uniform(0.5, 1.5, (d_out, n_group)) / (2**scheme.bits * d_in**0.5)
    if scheme.one_scale:
        zeros, scales = (np.full_like(x, x[0, 0]) for x in (zeros, scales))
    groups = np.arange(d_in) // (scheme.group or d_in)
    groups = rng.permutation(groups) if scheme.act_order else groups
    return codes, zeros, (4 * scales).astype(scheme.scale), groups


def dequantised(codes, zeros, scales, groups):
    """w = scale * (q - z), entry by entry, rounded to float32."""
    return np.array(
        [
            [
                float(scales[o, g]) * (int(q) - int(zeros[o, g]))
                for q, g in zip(row, groups, strict=True)
            ]
            for o, row in enumerate(codes)
        ],
        np.float32,
    )


def stored(scheme, codes, zeros, scales, groups):
    """The tensors of a matrix, by the last part of their name."""
    index = groups.astype(np.int32)
    if scheme.is_gptq:
        less = zeros - (scheme.format == "gptq")
        tensors = {
            "qweight": packed_rows(codes, scheme.bits).T,
            "qzeros": packed_rows(less.T, scheme.bits),
            "scales": scales.T,
        }
        return tensors | ({"g_idx": index} if scheme.act_order else {})
    low = 2 ** (scheme.bits - 1)
    is_stream = scheme.format == "pack-quantized"
    shown = (slice(0, 1), 0) if scheme.one_scale else slice(None)
    tensors = {"weight_scale": scales[shown]}
    if is_stream:
        tensors["weight_packed"] = packed_rows(codes, scheme.bits)
        tensors["weight_shape"] = np.array(codes.shape)
    else:
        tensors["weight"] = (codes - low).astype(np.int8)
    if not scheme.symmetric:
        is_plain = scheme.one_scale or not is_stream
        tensors["weight_zero_point"] = (
            (zeros - low).astype(np.int8)[shown]
            if is_plain
            else packed_rows(zeros.T, scheme.bits).T
        )
    return tensors | ({"weight_g_idx": index} if scheme.act_order else {})


def quantised(content, scheme, seed=0):
    """Two sets of tensors of a config.json: packed ones, and floats."""
    rng = np.random.default_rng(seed)
    floats, packed = tiny.weights(content, seed), {}
    for name, shape in expected_shapes(Config.from_json(content)).items():
        is_packed = ".layers." in name or (scheme.head and "lm_head" in name)
        if not is_packed or len(shape) == 1:
            packed[name] = floats[name]
            continue
        drawn = draw(rng, shape, scheme)
        floats[name] = dequantised(*drawn)
        for leaf, x in stored(scheme, *drawn).items():
            packed[f"{name.removesuffix('.weight')}.{leaf}"] = np.ascontiguousarray(x)
    return packed, floats


def write_pair(path, scheme, *, change=None, **changes):
    """Write the folder of a scheme and that of floats; `change` edits the packed tensors."""
    given = SIZES | changes
    content = tiny.config_dict(**given)
    packed, floats = quantised(content, scheme)
    if change is not None:
        change(packed)
    config = {"quantization_config": settings(scheme)} | given
    return (
        tiny.write_folder(path / "packed", tensors=packed, **config),
        tiny.write_folder(path / "floats", tensors=floats, **given),
    )
