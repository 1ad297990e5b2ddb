"""Write tests/golden/: what Hugging Face Transformers computes for tiny random Phi-3 models.

    python scripts/make_golden.py

Needs torch and transformers.  Each file is one model: config, weights, inputs, and results in
float32 and in float64.

Transformers' own float64 rounds to float32 in places (RMSNorm, softmax and the RoPE tables name the
type), so the float64 results come from a copy of its Phi-3 module in which these places say
float64.  The inverse frequencies stay float32 in both.
"""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import Phi3Config
from transformers.models.phi3 import modeling_phi3

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "window": {"num_key_value_heads": 2, "sliding_window": 4},
}
N_SEQ, N_PAD, N_NEW, CUT = 9, 4, 12, 5
TAPPED = [
    "input_layernorm",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_up_proj",
    "mlp.down_proj",
    "",
]


def float64_module():
    """Transformers' Phi-3, computing in float64 wherever it names a type."""
    source = (
        inspect.getsource(modeling_phi3)
        .replace("torch.float32", "torch.float64")
        .replace(".float()", ".double()")
    )
    assert ".double()" in source and "torch.float64" in source
    name = modeling_phi3.__package__ + ".modeling_phi3_float64"
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(name, loader=None, origin=modeling_phi3.__file__)
    )
    sys.modules[name], module.__file__ = module, modeling_phi3.__file__
    exec(compile(source, modeling_phi3.__file__, "exec"), module.__dict__)
    return module


def random_model(seed, config):
    """A float32 model, its weights rounded to float16 so that the file can hold them in half the
    space.
    """
    torch.manual_seed(seed)
    model = modeling_phi3.Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            values = 0.3 * torch.randn(parameter.shape) + (1 if parameter.ndim == 1 else 0)
            parameter.copy_(values.half().float())
    model.set_attn_implementation("eager")
    return model


def as_float64(model, module):
    """The same model, in float64 throughout."""
    twin = module.Phi3ForCausalLM(model.config).double().eval()
    twin.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    twin.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    twin.set_attn_implementation("eager")
    return twin


def compute(model, module, ids, padded, mask):
    """Everything that is compared, by name."""
    results, hooks = {}, []

    def keep(name, x):
        results["tap/" + name] = x

    def keep_input(name):
        return lambda _module, inputs: keep(name, inputs[0])

    def keep_output(name):
        return lambda _module, _inputs, output: keep(name, output)

    for number, layer in enumerate(model.model.layers):
        at = f"model.layers.{number}"
        for leaf in TAPPED:
            part = layer.get_submodule(leaf) if leaf else layer
            hooks.append(part.register_forward_hook(keep_output(f"{at}.{leaf}".rstrip("."))))
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(
                keep_input(f"{at}.self_attn.attention")
            )
        )
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(keep_input(f"{at}.mlp.swiglu")))
    for name in ("model.embed_tokens", "model.norm"):
        hooks.append(model.get_submodule(name).register_forward_hook(keep_output(name)))
    results["logits"] = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()

    # what is no module of its own: the RoPE tables, and q, k and v after RoPE
    cos, sin = model.model.rotary_emb(results["logits"], torch.arange(ids.shape[1])[None])
    results |= {"rope/cos": cos[0], "rope/sin": sin[0]}
    n_head, n_kv_head = model.config.num_attention_heads, model.config.num_key_value_heads
    for number in range(model.config.num_hidden_layers):
        at = f"tap/model.layers.{number}.self_attn."
        qkv = results[at + "qkv_proj"].unflatten(-1, (n_head + 2 * n_kv_head, -1)).transpose(1, 2)
        q, k, v = qkv.split((n_head, n_kv_head, n_kv_head), dim=1)
        q, k = module.apply_rotary_pos_emb(q, k, cos, sin)
        results |= {at + "q": q, at + "k": k, at + "v": v}

    first = model(ids[:, :CUT], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for at in range(CUT, ids.shape[1]):
        step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        parts.append(step.logits)
    results["cached logits"] = torch.cat(parts, dim=1)

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    results["padded logits"] = model(
        padded, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    return {name: x.detach().numpy() for name, x in results.items()}


def greedy(model, ids):
    """Tokens of greedy generation, and the smallest margin between the two best logits."""
    options = {
        "max_new_tokens": N_NEW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    best = torch.stack(out.logits).topk(2, dim=-1).values
    return out.sequences.numpy(), float((best[..., 0] - best[..., 1]).min())


@torch.no_grad()
def main():
    FOLDER.mkdir(exist_ok=True)
    module = float64_module()
    for seed, (variant, changes) in enumerate(VARIANTS.items(), start=10):
        config = Phi3Config(**BASE | changes)
        model = random_model(seed, config)
        ids = torch.randint(3, config.vocab_size, (1, N_SEQ))
        mask = torch.ones(2, N_SEQ, dtype=torch.int64)
        mask[1, :N_PAD] = 0
        padded = torch.cat([ids, torch.randint(3, config.vocab_size, (1, N_SEQ))]) * mask
        sequences, margin = greedy(model, ids)
        arrays = {
            "ids": ids.numpy(),
            "padded ids": padded.numpy(),
            "attention mask": mask.numpy(),
            "greedy": sequences,
        }
        for name, weight in model.state_dict().items():
            if not (name == "lm_head.weight" and config.tie_word_embeddings):
                arrays["weight/" + name] = weight.half().numpy()
        arrays |= {
            "float32/" + name: x
            for name, x in compute(model, modeling_phi3, ids, padded, mask).items()
        }
        exact = compute(as_float64(model, module), module, ids, padded, mask)
        arrays |= {
            "float64/" + name: x
            for name, x in exact.items()
            if not name.startswith(("tap/", "cached"))
        }
        about = {
            "script": "scripts/make_golden.py",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "seed": seed,
            "attention": "eager",
            "cut": CUT,
            "greedy margin": round(margin, 4),
            "config": BASE | changes | {"model_type": "phi3"},
        }
        about = {"about": json.dumps(about)}  # one key: the order of several would be random
        path = FOLDER / f"{variant}.safetensors"
        save_file(
            {name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, metadata=about
        )
        difference = (
            np.abs(exact["logits"] - arrays["float32/logits"]).max() / np.abs(exact["logits"]).max()
        )
        path.chmod(0o644)
        print(
            f"{path.name}: {path.stat().st_size} bytes; greedy margin {margin:.3g}; "
            f"float32 from float64: {difference:.2g}"
        )


if __name__ == "__main__":
    main()
