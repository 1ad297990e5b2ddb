"""LoRA adapters that PEFT wrote, and the logits that PEFT gives, wherever it is installed."""

import numpy as np
import pytest
import tiny
from close import close

import npllm
from npllm.errors import NpllmValueError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
load_file = pytest.importorskip("safetensors.torch").load_file

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

IDS = tiny.random_ids(2, 9)
STORED = {"float32": "F32", "bfloat16": "BF16"}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "sliding_window": ...,
    "original_max_position_embeddings": ...,
}
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CASES = {
    "fused": ({}, {"target_modules": FUSED}),
    "rsLoRA, odd rank": ({}, {"target_modules": FUSED, "r": 5, "use_rslora": True}),
    "split": (LLAMA, {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}),
    "all linear maps": ({}, {"target_modules": "all-linear"}),
    "all linear maps of Llama": (LLAMA, {"target_modules": "all-linear"}),
    "expression": (LLAMA, {"target_modules": r".*\.1\..*(k|gate)_proj"}),
    "patterns": (
        {},
        {
            "target_modules": FUSED,
            "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {r"0\.self_attn\.o_proj": 3},
        },
    ),
    "one layer": ({}, {"target_modules": FUSED, "layers_to_transform": [1]}),
    "without": ({}, {"target_modules": FUSED, "exclude_modules": ["o_proj"]}),
    "embeddings": ({}, {"target_modules": [*FUSED, "embed_tokens", "lm_head"]}),
    "tied embeddings": (
        {"tie_word_embeddings": True},
        {"target_modules": ["qkv_proj", "embed_tokens"]},
    ),
    "whole modules": (
        {},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a tied table, replaced": (
        {"tie_word_embeddings": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    ),
}


def trained(base, seed=0, **settings):
    """A PEFT model with random factors and random whole modules."""
    defaults = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.LoraConfig(**defaults | settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                x.copy_(0.2 * torch.randn(x.shape))
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case, tmp_path):
    changes, settings = CASES[case]
    path = tiny.write_folder(tmp_path / "base", **changes)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = trained(base, **settings)
    theirs.save_pretrained(tmp_path / "adapter")
    want = logits(theirs)
    mine = npllm.load(path, adapter=tmp_path / "adapter")
    close(mine(IDS), want, times=10)
    assert np.abs(npllm.load(path)(IDS) - want).max() > 0.1
    close(mine.merge_adapter()(IDS), want, times=10)  # PEFT's own merge changes a tied lm_head too


@pytest.mark.parametrize("case", [x for x in CASES if "tied" not in x])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_folder_is_the_one_that_peft_saves(case, dtype, tmp_path):
    changes, settings = CASES[case]
    path = tiny.write_folder(tmp_path / "base", dtype=tiny.DTYPES[STORED[dtype]], **changes)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    theirs = trained(base, **settings)
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    out = npllm.merge(path, tmp_path / "adapter", tmp_path / "ours", progress=False)
    ours, want, old = (load_file(x / "model.safetensors") for x in (out, tmp_path / "theirs", path))
    assert ours.keys() == want.keys()
    unit = {"float32": 2**-24, "bfloat16": 2**-8}[dtype]
    for name, x in want.items():
        assert ours[name].dtype == x.dtype == getattr(torch, dtype)
        mine, theirs, before = (y.double() for y in (ours[name], x, old[name]))
        # Each rounds the sum; PEFT rounds the update of an embedding before that.
        bound = unit * (2 * theirs.abs() + (theirs - before).abs()) + 2e-6
        assert ((mine - theirs).abs() <= bound).all(), name
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    close(npllm.load(out, dtype="float32")(IDS), logits(again), times=10)


def test_two_adapters_in_one_folder_as_peft_adds_them(tmp_path):
    path = tiny.write_folder(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = trained(base, target_modules=FUSED)
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if ".other." in name:
                x.copy_(0.2 * torch.randn(x.shape))
    theirs.save_pretrained(tmp_path / "a")
    folders = [tmp_path / "a", tmp_path / "a" / "other"]
    out = npllm.merge(path, folders, tmp_path / "ours", progress=False)
    want = logits(theirs.merge_and_unload(adapter_names=["default", "other"]))
    close(npllm.load(out)(IDS), want, times=10)


def test_several_adapters_switched_by_name(tmp_path):
    path = tiny.write_folder(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = trained(base, target_modules=FUSED)
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if ".other." in name:
                x.copy_(0.2 * torch.randn(x.shape))
    theirs.save_pretrained(tmp_path / "a")
    mine = npllm.load(path)
    mine.load_adapter(tmp_path / "a", name="default")
    mine.load_adapter(tmp_path / "a" / "other")
    for name in ("default", "other", "default"):
        theirs.set_adapter(name)
        mine.set_adapter(name)
        close(mine(IDS), logits(theirs), times=10)
    with theirs.disable_adapter():
        mine.set_adapter(None)
        close(mine(IDS), logits(theirs), times=10)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_dora": True}, "use_dora is not implemented"),
        ({"bias": "lora_only"}, "bias must be"),
        ({"lora_bias": True}, "lora_bias is not implemented"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights was trained on changed base weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is not implemented"),
    ],
)
def test_what_peft_writes_for_other_kinds_is_refused(settings, words, tmp_path):
    path = tiny.write_folder(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trained(base, target_modules=FUSED, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NpllmValueError, match=words):
        npllm.load(path, adapter=tmp_path / "adapter")


def test_a_resized_vocabulary_names_both_sizes(tmp_path):
    path = tiny.write_folder(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base.resize_token_embeddings(64)
    theirs = trained(base, target_modules=FUSED, modules_to_save=["embed_tokens", "lm_head"])
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NpllmValueError, match=r"\[61, 32\], got \[64, 32\]"):
        npllm.load(path, adapter=tmp_path / "adapter")
