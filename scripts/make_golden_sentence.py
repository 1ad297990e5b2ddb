"""Write tests/golden/sentence.json: vectors of tiny folders, made by the library
sentence-transformers.

    python scripts/make_golden_sentence.py

Needs sentence-transformers, which brings torch and transformers.  The folders are those of
`tests/sentence.py`, which makes them again on any machine; float32 on the CPU.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import sentence  # noqa: E402


def make(case):
    """Vectors of all texts for every call of a case."""
    with tempfile.TemporaryDirectory() as folder:
        sentence.write(folder, case)
        model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        vectors = []
        for call in case.calls:
            options = {
                "normalize_embeddings" if key == "normalize" else key: value
                for key, value in call.items()
            }
            vectors.append(model.encode(sentence.TEXTS, **options))
    return [[[float(f"{x:.9g}") for x in row] for row in rows] for rows in vectors]


def main():
    """Write the file."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    versions = {
        module.__name__: module.__version__
        for module in (sentence_transformers, transformers, torch, np)
    }
    about = {
        "made by": "scripts/make_golden_sentence.py",
        "made with": versions | {"python": platform.python_version()},
    }
    path = ROOT / "tests" / "golden" / "sentence.json"
    cases = {name: make(case) for name, case in sentence.CASES.items()}
    path.write_text(
        json.dumps(about | {"texts": sentence.TEXTS, "cases": cases}, separators=(",", ":")) + "\n",
        encoding="utf-8",
    )
    print(f"{path.name}: {path.stat().st_size} bytes, {len(cases)} cases")


if __name__ == "__main__":
    main()
