"""Models of the family with few channels: real config.json files scaled down, reproducible weights,
checkpoint folders.
"""

import contextlib
import hashlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiny

import npllm
from npllm.checkpoints.phi3_layout import expected_shapes
from npllm.config.config import Config

SHARED = Path(__file__).parents[2] / "shared"
SHRINK = 128  # of every length in tokens: a context of 4096 becomes 32
N_LONG = (1.0, 1.5, 3.0, 6.0)


class Configs(dict):
    """Content by name; the test that asks for a missing one is skipped."""

    def __missing__(self, name):
        pytest.skip(f"configs/{name}.json is not beside the repository")


def real_configs():
    """Content of every published config.json at hand: name -> dict."""
    paths = sorted((SHARED / "configs").glob("*.json"))
    return Configs({path.stem: json.loads(path.read_text("utf-8")) for path in paths})


def shared_file(*parts):
    """A file of the shared folder; the test is skipped where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside the repository")
    return path


def scaled(content):
    """Shrink a published config.json, and keep every ratio and feature of it.

    Lengths in tokens by SHRINK, heads to a fourth, channels of a head to an eighth, layers to 3,
    ids to the end of a small vocabulary; longrope factors are cut to every eighth.
    """
    small = content.copy()
    n_head, n_kv_head, d_model = (
        content[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if d_model > 1000:
        d_head = d_model // n_head // 8
        small |= {
            "num_attention_heads": n_head // 4,
            "num_key_value_heads": n_kv_head // 4 or 1,
            "hidden_size": n_head // 4 * d_head,
            "num_hidden_layers": 3,
        }
        if n_head == 40:  # 10 key/value heads: keep the 4 query heads of each
            small |= {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 8 * d_head}
        small["intermediate_size"] = content["intermediate_size"] * small["hidden_size"] // d_model
        scaling = content.get("rope_scaling")
        if scaling:
            small["rope_scaling"] = scaling | {
                key: scaling[key][4::8] for key in ("short_factor", "long_factor")
            }
    n_vocab = content["vocab_size"] // 200
    small["vocab_size"] = n_vocab
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if content[key] is not None:
            small[key] = (
                1 if content[key] == 1 else n_vocab - 1 - (content["vocab_size"] - content[key]) % 3
            )
    for key in ("max_position_embeddings", "original_max_position_embeddings"):
        small[key] = content[key] // SHRINK
    if content["sliding_window"]:
        small["sliding_window"] = (content["sliding_window"] + 1) // SHRINK - content[
            "sliding_window"
        ] % 2
    return small | {"torch_dtype": "float32"}


def renamed(content):
    """The same config.json with `su` called by its later name, which Transformers reads."""
    scaling = content.get("rope_scaling")
    return (
        content | {"rope_scaling": scaling | {"type": "longrope"}}
        if scaling and scaling.get("type") == "su"
        else content
    )


def tensors(content, seed=0, dtype=np.float32):
    """Every tensor that a checkpoint of this config.json holds, the same on any machine and any
    version of NumPy.

    Matrices have entries of size about 1 / sqrt(d_in), those of q, k and v more, so that attention
    is far from flat.
    """
    source = np.random.PCG64(seed)
    result = {}
    for name, shape in expected_shapes(Config.from_json(content)).items():
        raw = (source.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(
            np.float64
        ) / 2**23 - 1  # uniform in -1 ... 1
        size = (
            3.0 if any(leaf in name for leaf in ("qkv_proj", "q_proj", "k_proj", "v_proj")) else 2.0
        )
        x = raw.reshape(shape) * (size / np.sqrt(shape[-1]) if len(shape) == 2 else 0.25)
        wide = "embed" in name and not content.get("tie_word_embeddings")
        result[name] = (x * np.sqrt(shape[-1]) if wide else x + 1 if "norm" in name else x).astype(
            dtype
        )
    return result


def fingerprint(weights):
    """Hash of the bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def write(folder, content, weights=None, generation=None):
    """Write a checkpoint folder; return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_json(folder / "config.json", content)
    tiny.write_safetensors(
        folder / "model.safetensors", tensors(content) if weights is None else weights
    )
    if generation is not None:
        tiny.write_json(folder / "generation_config.json", generation)
    return folder


def load(content, weights=None, **options):
    """Load a model by way of a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return npllm.load(write(folder, content, weights), **options)


def longrope(n_original=8, **changes):
    """Content of a config.json with longrope: 8 rotated channels a head, factors that change every
    angle at the switch.
    """
    rope = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [*N_LONG]}
    return tiny.config_dict(
        **{
            "rope_scaling": rope,
            "original_max_position_embeddings": n_original,
            "max_position_embeddings": 16 * n_original,
        }
        | changes
    )


@lru_cache(maxsize=32)
def _cached(content, dtype, seed):
    return load(json.loads(content), tensors(json.loads(content), seed), dtype=dtype)


def model(content, dtype="float64", seed=0):
    """A model with random weights, made once for each content."""
    return _cached(json.dumps(content, sort_keys=True), dtype, seed)


def ids_of(config, shape, seed=0):
    """Random ids, none of them special."""
    return np.random.default_rng(seed).integers(3, config.vocab_size - 4, shape)


def alone(model, ids):
    """Last logits of one row, computed anew at that length with nothing beside it: [n_vocab]."""
    return model(np.asarray(ids)[None], logits_to_keep=1)[0, -1]


def padded(rows, pad=0):
    """Rows of different lengths in one array, padded on the left, and the mask: 1 for a token."""
    n = max(map(len, rows))
    ids = np.array([[pad] * (n - len(row)) + list(row) for row in rows])
    return ids, np.array([[0] * (n - len(row)) + [1] * len(row) for row in rows])


def margin(logits):
    """Smallest distance between the best and the second best logit of any row."""
    best = np.sort(logits, axis=-1)[..., -2:]
    return float((best[..., 1] - best[..., 0]).min())


@contextlib.contextmanager
def prefill_chunk(n):
    """Send at most n tokens at a time through the layers where there is a cache."""
    module = __import__("npllm.forward_pass", fromlist=["PREFILL_CHUNK"])
    before, module.PREFILL_CHUNK = module.PREFILL_CHUNK, n
    try:
        yield
    finally:
        module.PREFILL_CHUNK = before


class Broken(Exception):
    """What a failing operation raises in a test."""


def failing(model, n_calls):
    """The same model, whose attention raises at its n-th call, and works again after that."""
    calls = []

    def attention(*args, **options):
        calls.append(None)
        if len(calls) == n_calls:
            raise Broken
        return model.ops.attention(*args, **options)

    return npllm.Model(model.config, model.params, ops=model.ops.replace(attention=attention))


class Trial:
    """What a model of a scaled config is asked, the same for us and for Transformers.

    ids [1, n]: one sequence, over the longrope switch where there is one.  lengths: where its last
    logits are compared.  calls: how a cached run is cut, over the window and over the switch.
    prompt [1, n]: to be continued by n_new tokens.  rows, mask [2, n]: two sequences, one of them
    padded on the left, below the switch.
    """

    def __init__(self, content):
        config = Config.from_json(content)
        n = min(40, config.max_position_embeddings)
        self.ids = ids_of(config, (1, n), seed=1)
        self.lengths = [
            length for length in (1, 2, 8, 14, 15, 16, 17, 31, 32, 33, 34, 40) if length <= n
        ]
        self.calls = [7, 1, 6, 1, 1, 1, 14, 1] + ([1, 1, 6] if n == 40 else [])
        self.prompt, self.n_new = self.ids[:, :24], min(14, config.max_position_embeddings - 24)
        self.rows, self.mask = padded(
            [ids_of(config, 20, seed=2), ids_of(config, 13, seed=3)], config.pad_token_id or 0
        )
