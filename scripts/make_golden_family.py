"""Write tests/golden/family_*.npz: logits of scaled-down published models, made by Hugging Face
Transformers.

    python scripts/make_golden_family.py

Needs torch, transformers, and the published config.json files in ../shared/configs.  Each file
holds the scaled config.json, the versions that made it, and a hash of the random weights, which
`tests/family.py` makes again on any machine; eager attention in float32 on the CPU.  Where longrope
switches its factors, the logits are those of a full forward pass at that length.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import family  # noqa: E402

NAMES = {
    "mini_4k": "phi-3-mini-4k-instruct.dotnet-machinelearning",
    "mini_3_5": "Phi-3.5-mini-instruct",
    "mini_128k_su": "phi-3-mini-128k-instruct.dotnet-machinelearning",
    "medium_128k_su": "phi-3-medium-128k-instruct.dotnet-machinelearning",
    "phi_4": "phi-4",
    "phi_4_mini": "Phi-4-mini-instruct",
    "yujiepan_tiny": "yujiepan-phi-3-tiny-random",
}


def make(content):
    """Ask Transformers what a golden file holds: name -> array."""
    trial = family.Trial(content)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        family.write(folder, family.renamed(content), family.tensors(content))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        ids, rows, mask = (torch.tensor(x) for x in (trial.ids, trial.rows, trial.mask))
        at_length = [model(ids[:, :length]).logits[0, -1].numpy() for length in trial.lengths]
        prefill = model(ids[:, :20]).logits[0].numpy()
        left_padded = (
            model(rows, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            .logits[:, -1]
            .numpy()
        )
        made = model.generate(
            ids[:, :24],
            attention_mask=torch.ones_like(ids[:, :24]),
            max_new_tokens=trial.n_new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    scores = np.stack([step[0].numpy() for step in made.logits])
    return {
        "at_length": np.stack(at_length),
        "prefill": prefill[:, ::8],
        "left_padded": left_padded,
        "generated": made.sequences.numpy(),
        "margin": np.array(family.margin(scores), np.float32),
    }


def main():
    """Write every file."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for short, name in NAMES.items():
        content = family.scaled(family.real_configs()[name])
        about = {
            "config": content,
            "published as": name,
            "weights sha256": family.fingerprint(family.tensors(content)),
            "made with": {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "made by": "scripts/make_golden_family.py",
        }
        path = ROOT / "tests" / "golden" / f"family_{short}.npz"
        path.parent.mkdir(exist_ok=True)
        arrays = make(content)
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
        print(
            f"{path.name}: {path.stat().st_size} bytes, "
            f"smallest margin of the generated tokens {arrays['margin']:.3g}"
        )


if __name__ == "__main__":
    main()
