"""Where weights were read from, and how to read them again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npllm.arrays import backend_namespace
from npllm.checkpoints import bert_layout, phi3_layout
from npllm.checkpoints.gguf.config import gguf_config
from npllm.checkpoints.gguf.reader import GGUFFile, is_gguf
from npllm.checkpoints.gguf.weights import load_gguf_params
from npllm.config.bert_config import BertConfig
from npllm.config.config import Config

__all__ = ["Origin", "read_config", "read_params"]


@dataclass(frozen=True)
class Origin:
    """Where weights were read from: enough for another process to read them again.

    Attributes
    ----------
    folder : Path
        Or a GGUF file.
    dtype : str or None
        As in `load`.
    backend : str
        "numpy" or "cupy".
    mmap : bool
    is_pooled : bool
        Of an encoder: whether its folder states how vectors are pooled.
    """

    folder: Path
    dtype: str | None = None
    backend: str = "numpy"
    mmap: bool = True
    is_pooled: bool = False

    def read(self, config: Config | BertConfig, *, progress: bool = False) -> Any:
        """Read the weights: Params, or BertParams for a BertConfig."""
        how: Any = {
            "dtype": self.dtype,
            "xp": backend_namespace(self.backend),
            "mmap": self.mmap,
        }
        if isinstance(config, BertConfig):
            return bert_layout.load_params(self.folder, config, is_pooled=self.is_pooled, **how)
        if is_gguf(self.folder):
            return load_gguf_params(GGUFFile(self.folder), config, progress=progress, **how)
        return phi3_layout.load_params(self.folder, config, progress=progress, **how)


def read_config(path: Path) -> Config:
    """Read the configuration of a checkpoint folder or a GGUF file."""
    return Config.from_json(gguf_config(GGUFFile(path)) if is_gguf(path) else path)


def read_params(path: Path) -> Any:
    """Read the weights of a checkpoint folder or a GGUF file, as they are stored."""
    return Origin(path).read(read_config(path))
