"""Write npllm/testing/bundles/: tiny checkpoints with every intermediate value in float64.

    python scripts/make_golden_bundles.py

Each bundle is a folder: config.json and model.safetensors (a checkpoint in float32),
values.safetensors (float64: every tapped value and the logits; int64: input_ids) and index.json
(names with axes and formula, versions).  Where torch and Transformers are installed, the logits are
compared with theirs in float64, and the difference is written into index.json.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import npllm
from npllm.models.taps import NAMES, PAIRS
from npllm.ops import reference

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import sentence  # noqa: E402
import tiny  # noqa: E402

OUT = ROOT / "npllm" / "testing" / "bundles"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 29,
    "max_position_embeddings": 64,
}
LONG = {
    "original_max_position_embeddings": 8,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.4, 5.0]},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "original_max_position_embeddings": ...,
    "sliding_window": ...,
    "num_key_value_heads": 2,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
BUNDLES = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "window": {"num_key_value_heads": 2, "sliding_window": 4},
    "longrope_short": LONG | {"n_seq": 7},
    "longrope_long": LONG | {"n_seq": 11},
    "partial_rotary": {"hidden_size": 32, "partial_rotary_factor": 0.5},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": LLAMA,
}
"""Name -> changes of the config, and `n_seq`, the number of tokens."""


def main():
    """Write every bundle."""
    for name, changes in BUNDLES.items():
        changes = dict(changes)
        n_seq = changes.pop("n_seq", 9)
        content = tiny.config_dict(**SMALL | changes)
        write_decoder(OUT / name, content, n_seq)
    write_encoder(OUT / "bert")
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}: {size} bytes")


def write_decoder(folder, content, n_seq):
    """Write a decoder, its taps and logits."""
    tensors = drawn(content)
    tiny.write_folder(folder, tensors=tensors)
    tiny.write_json(folder / "config.json", content)
    model = npllm.load(folder, dtype="float64", ops=reference)
    ids = np.random.default_rng(7).integers(3, content["vocab_size"], (2, n_seq))
    values = {}

    def tap(name, x):
        values[name] = np.ascontiguousarray(x)
        return x

    tap.pairs = True
    values["logits"] = model(ids, tap=tap)
    about = {name: described(name) for name in values}
    finish(folder, ids, values, about, transformers_difference(folder, ids, values["logits"]))


def drawn(content):
    """Draw the tensors of a checkpoint; those of Llama by family.py."""
    if content["model_type"] == "llama":
        import family

        return family.tensors(content)
    return tiny.weights(content, seed=3)


def described(name):
    """Axes and formula of a tapped value."""
    if name == "logits":
        return ["[n_batch, n_seq, n_vocab]", "the scores of every next token"]
    parts = ["N" if part.isdigit() else part for part in name.split(".")]
    return list((NAMES | PAIRS)[".".join(parts)])


def write_encoder(folder):
    """Write an encoder, and the result of every operation in the order of the calls."""
    tiny.write_folder(folder, tensors=sentence.weights())
    tiny.write_json(folder / "config.json", sentence.CONFIG)
    encoder = npllm.load(folder, dtype="float64", ops=reference)
    ids = np.array([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    valid = (ids != 0).astype(np.int64)
    values, about = (
        {"attention_mask": valid},
        {"attention_mask": ["[n_batch, n_seq]", "1: a token"]},
    )

    def recorded(name, op):
        def call(*args, **options):
            y = op(*args, **options)
            if hasattr(y, "dtype"):
                key = f"{len(values):02d}.{name}"
                values[key], about[key] = (
                    np.ascontiguousarray(y),
                    ["[...]", f"{name}, in call order"],
                )
            return y

        return call

    names = ("embed", "linear", "layer_norm", "attention", "gelu", "add")
    traced = encoder.with_ops(**{name: recorded(name, getattr(reference, name)) for name in names})
    values["hidden"] = np.ascontiguousarray(traced(ids, attention_mask=valid))
    about["hidden"] = ["[n_batch, n_seq, d_model]", "the last hidden states"]
    difference = transformers_difference(folder, ids, values["hidden"], valid)
    finish(folder, ids, values, about, difference)


def transformers_difference(folder, ids, wanted, valid=None):
    """Return the largest difference from Transformers in float64; None where it is missing."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    kind = transformers.AutoModel if valid is not None else transformers.AutoModelForCausalLM
    more = {} if valid is None else {"attention_mask": torch.tensor(valid)}
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    with torch.no_grad():
        found = model(torch.tensor(ids), **more)
    y = (found.logits if valid is None else found.last_hidden_state).numpy()
    real = slice(None) if valid is None else valid.astype(bool)
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "largest difference": float(np.abs(y - wanted)[real].max()),
        "largest value": float(np.abs(wanted)[real].max()),
    }


def finish(folder, ids, values, about, difference):
    """Write the values and the index."""
    save_file({"input_ids": ids.astype(np.int64), **values}, folder / "values.safetensors")
    index = {
        "made by": "scripts/make_golden_bundles.py",
        "made with": {
            "npllm": npllm.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "compared with": difference,
        "values": {
            name: {"axes": axes, "formula": formula, "shape": list(values[name].shape)}
            for name, (axes, formula) in about.items()
        },
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print(folder.name, len(values), "values", difference)


if __name__ == "__main__":
    main()
