"""The further modes of `fuzz.py`, and the limits of one case: seconds, bytes.

A case is a function of (seed, number).  `run` returns the name of the outcome; anything but an
NpllmError, and any broken promise, is raised.
"""

from fuzz_gguf import GGUFCases
from fuzz_hub import HubCases
from fuzz_tokenizer import TokenizerCases

LIMITS = {"gguf": (10.0, 256 << 20), "hub": (10.0, 256 << 20), "tokenizer": (10.0, 256 << 20)}
MODES = {"gguf": GGUFCases, "hub": HubCases, "tokenizer": TokenizerCases}
