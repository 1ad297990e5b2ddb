"""Stage `weights`: random checkpoints in the shapes of real models, made on the machine.

They have fewer layers where disk, memory or device are too small, and the record says so.
"""

import json
import os
import shutil
import sys
from math import prod
from pathlib import Path
from typing import Any

from gpu.records import Records, plant, rehearsing, run_recorded

CONFIGS = Path(__file__).parent / "configs"
MODELS = ("smollm2", "phi-3-mini")
SHARE = 0.8  # of the free bytes that weights may take
SMALL = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}  # heads of 64 channels, which the kernels take


def main(folder: str) -> int:
    """Make what is not there yet; return 0 where every checkpoint is."""
    records = Records(folder, "weights")
    passed = [run_recorded(records, name, lambda name=name: make(name)) for name in MODELS]
    return int(not all(passed))


def model_folder(name: str) -> Path:
    """Where the checkpoint of a model lies."""
    return Path(os.environ["NPLLM_GPU_WEIGHTS"]) / f"random-{name}"


def make(name: str) -> dict[str, Any]:
    """Write one checkpoint, or find it: the facts of its record."""
    from make_random_checkpoint import write_checkpoint

    data, folder = config(name), model_folder(name)
    plant(f"weights/{MODELS.index(name)}")
    facts = {
        "folder": str(folder),
        "layers_wanted": data["num_hidden_layers"],
        "reused": (folder / "config.json").exists(),
    }
    if facts["reused"]:
        made = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return facts | {"layers": made["num_hidden_layers"], "bytes": weight_bytes(made)}
    n_layers = layers_that_fit(data, free_bytes(folder.parent))
    data |= {"num_hidden_layers": n_layers}
    write_checkpoint(data, folder)
    facts |= {"layers": n_layers, "bytes": weight_bytes(data)}
    if n_layers < facts["layers_wanted"]:
        facts["fewer_layers"] = f"room for {n_layers} of {facts['layers_wanted']} layers"
    return facts


def config(name: str) -> dict[str, Any]:
    """The content of config.json; small in a rehearsal."""
    data = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return data | SMALL if rehearsing() else data


def weight_bytes(data: dict[str, Any]) -> int:
    """Bytes of all weights in bfloat16."""
    from npllm.checkpoints.phi3_layout import expected_shapes
    from npllm.config.config import Config

    return 2 * sum(map(prod, expected_shapes(Config.from_json(data)).values()))


def free_bytes(folder: Path) -> int:
    """The least of what is free on the disk, in memory and on the device."""
    import cupy

    folder.mkdir(parents=True, exist_ok=True)
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(shutil.disk_usage(folder).free, memory, cupy.cuda.runtime.memGetInfo()[0])


def layers_that_fit(data: dict[str, Any], free: int) -> int:
    """The most layers whose weights take at most SHARE of the free bytes.

    A RuntimeError where not one does.
    """
    wanted = data["num_hidden_layers"]
    for n_layers in range(wanted, 0, -1):
        if weight_bytes(data | {"num_hidden_layers": n_layers}) <= SHARE * free:
            return n_layers
    raise RuntimeError(f"not one of {wanted} layers fits into {SHARE:.0%} of {free / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
