"""Make tests/golden/emulate_*.npz: logits of tiny models that Transformers runs in a 16-bit type on
the CPU, as bits.

With --measure, print what the docstring of npllm.ops.emulate states: differences, and agreement op
by op; write nothing.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

import npllm
from npllm import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import family
import tiny

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
NUMPY = {"bfloat16": tiny.DTYPES["BF16"], "float16": tiny.DTYPES["F16"]}
N_SEQ, N_PROMPT, N_NEW, N_PAD = 12, 5, 8, 3
VARIANTS = {  # what sets the published models apart, with few channels
    "mha_window": {"num_key_value_heads": 4, "sliding_window": 4},
    "gqa": {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96},
    "longrope": {
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 3.0, 6.0],
        },
    },
    "longrope_partial_tied": {
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.2, 1.3],
            "long_factor": [1.0, 3.0, 6.0],
        },
    },
    "deep": {"num_hidden_layers": 6},
}
FLOAT16 = {
    "mha_window": VARIANTS["mha_window"],
    "longrope_partial_tied": VARIANTS["longrope_partial_tied"] | {"num_hidden_layers": 1},
}
SAMPLE = (
    "The capital of France is Paris. The quick brown fox jumps over the lazy dog, and then it runs "
    "into the forest."
)


def transformers_model(folder, dtype):
    """Load a folder with Transformers, eager attention."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def pair(content, seed, dtype):
    """The same weights as Transformers' model in a 16-bit type, and as ours with the operations
    that emulate it.
    """
    weights = family.tensors(content, seed, NUMPY[dtype])
    with tempfile.TemporaryDirectory() as folder:
        family.write(folder, content, weights)
        theirs = transformers_model(folder, dtype)
        ours = npllm.load(folder, ops=ops.emulate(dtype))
    return theirs, ours, family.fingerprint(weights)


def bits(x):
    """A 16-bit tensor as the integers that its bits are."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


def cached(theirs, ids):
    """Logits of a prompt and then of one token at a time."""
    first = theirs(ids[:, :N_PROMPT], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for at in range(N_PROMPT, ids.shape[1]):
        parts.append(theirs(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def compute(theirs, dtype, n_short, seed):
    """Everything a golden file compares; None where PyTorch's kernels for many tokens and for one
    do not agree with each other.

    They sum in different orders, and which one of them is to be met would be a matter of the CPU.
    """
    ids = family.ids_of(theirs.config, (2, N_SEQ), seed)
    mask = np.ones((2, n_short), dtype=np.int64)
    mask[1, :N_PAD] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    short = torch.tensor(ids[:, :n_short])
    out = theirs.generate(
        torch.tensor(ids[:1, :N_PROMPT]),
        max_new_tokens=N_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps, generated = torch.stack(out.logits, dim=1).to(getattr(torch, dtype)), out.sequences
    anew = [
        theirs(generated[:, :n], use_cache=False).logits[:, -1]
        for n in range(N_PROMPT, generated.shape[1])
    ]
    padded = theirs(
        short,
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
        use_cache=False,
    ).logits
    by_token, prefill = cached(theirs, short), theirs(short, use_cache=False).logits
    agree = torch.equal(by_token, prefill) and torch.equal(steps, torch.stack(anew, dim=1))
    if generated.shape[1] < N_PROMPT + N_NEW or not agree:
        return None
    return {
        "ids": ids,
        "mask": mask,
        "logits": bits(theirs(torch.tensor(ids), use_cache=False).logits),
        "padded": bits(padded),
        "cached": bits(by_token),
        "generated": generated.numpy(),
        "steps": bits(steps),
    }


def write():
    """Write every golden file."""
    cases = [("bfloat16", name, changes) for name, changes in VARIANTS.items()]
    cases += [("float16", name, changes) for name, changes in FLOAT16.items()]
    for dtype, name, changes in cases:
        content = tiny.config_dict(**changes, torch_dtype=dtype)
        n_short = (
            8 if "longrope" in name else N_SEQ
        )  # cached calls of Transformers go wrong across the switch
        for seed in range(1, 100):
            theirs, ours, fingerprint = pair(content, seed, dtype)
            arrays = compute(theirs, dtype, n_short, seed)
            if arrays is not None:
                break
        about = {
            "script": "scripts/make_golden_emulate.py",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "attention": "eager",
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "dtype": dtype,
            "seed": seed,
            "weights": fingerprint,
            "config": content,
        }
        path = FOLDER / f"emulate_{dtype}_{name}.npz"
        np.savez_compressed(path, about=json.dumps(about), **arrays)
        got = ours(arrays["ids"]).astype(NUMPY[dtype]).view(np.uint16)
        share = np.mean(got == arrays["logits"])
        print(
            f"{path.name}: seed {seed}, {path.stat().st_size} bytes; "
            f"{share:.2%} of the logits are equal bits"
        )


def report(title, got, want):
    """Print one line of a comparison."""
    error = np.abs(got.astype(np.float64) - want)
    top = np.mean(got.argmax(-1) == want.argmax(-1))
    print(
        f"  {title:<40} max {error.max():<9.2g} mean {error.mean():<9.2g} "
        f"equal {np.mean(got == want):8.3%}  top-1 {top:.1%}"
    )


@torch.no_grad()
def measure_one(name, folder, theirs, dtype, ids):
    """Compare Transformers in 16 bits, the default operations and the emulation, with float64 and
    with each other.
    """
    hf = theirs(torch.tensor(ids), use_cache=False).logits.float().numpy()
    default, emulated, exact = (
        npllm.load(folder, **options)(ids)
        for options in ({}, {"ops": ops.emulate(dtype)}, {"dtype": "float64", "ops": ops.reference})
    )
    print(f"{name}, {dtype}: |logits| up to {np.abs(exact).max():.3g}")
    for title, got in ("default", default), ("emulation", emulated), ("Transformers", hf):
        report(f"{title} from float64", got, exact)
    report("default from Transformers", default, hf)
    report("emulation from Transformers", emulated, hf)


@torch.no_grad()
def measure_ops(theirs, emulated, ids):
    """Give each linear and norm of the emulation the very input that Transformers' had: the share
    of equal outputs.
    """
    equal = {}

    def compare(module, inputs, output):
        x, weight = (
            inputs[0].float().numpy(),
            module.weight.view(torch.int16).numpy().view(NUMPY["bfloat16"]),
        )
        norm = hasattr(module, "variance_epsilon")
        y = (
            emulated.rms_norm(x, weight, module.variance_epsilon)
            if norm
            else emulated.linear(x, weight)
        )
        equal.setdefault(f"{type(module).__name__}, {x.shape[-1]} channels in", []).append(
            np.mean(y == output.float().numpy())
        )

    hooks = [
        module.register_forward_hook(compare)
        for module in theirs.modules()
        if hasattr(module, "variance_epsilon") or isinstance(module, torch.nn.Linear)
    ]
    theirs(torch.tensor(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    for name, shares in equal.items():
        print(
            f"  one op, with Transformers' own input: {name}: {np.mean(shares):.5%} equal "
            f"({len(shares)} of them)"
        )


def measure():
    """Print the differences that the documentation states."""
    for dtype in ("bfloat16", "float16"):
        for seed, (name, changes) in enumerate(VARIANTS.items(), start=1):
            content = tiny.config_dict(**changes, torch_dtype=dtype)
            with tempfile.TemporaryDirectory() as folder:
                family.write(folder, content, family.tensors(content, seed, NUMPY[dtype]))
                theirs = transformers_model(folder, dtype)
                measure_one(
                    name, folder, theirs, dtype, family.ids_of(theirs.config, (4, N_SEQ), seed)
                )
    folder = npllm.checkpoints.fetch.fetch(progress=False)
    theirs = transformers_model(folder, "bfloat16")
    ids = np.array([npllm.Tokenizer.from_folder(folder).encode(SAMPLE)])
    measure_one(f"default checkpoint, {ids.size} tokens", folder, theirs, "bfloat16", ids)
    measure_ops(theirs, ops.emulate("bfloat16"), ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure, write nothing")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    measure() if parser.parse_args().measure else write()
