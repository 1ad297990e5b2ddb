"""llama-cpp-python's server, without llama.cpp's buffers for Intel AMX where
LLAMA_CPP_EXTRA_BUFFERS=0 declines them: with these some builds end in an illegal instruction.
"""

import os
import sys
from typing import Any


def run() -> int:
    """Run `python -m llama_cpp.server` with the arguments of this process."""
    from llama_cpp import llama_cpp
    from llama_cpp.server.__main__ import main

    defaults = llama_cpp.llama_model_default_params

    def settings() -> Any:
        found = defaults()
        found.use_extra_bufts = os.environ.get("LLAMA_CPP_EXTRA_BUFFERS", "1") != "0"
        return found

    llama_cpp.llama_model_default_params = settings
    return int(main() or 0)


if __name__ == "__main__":
    sys.exit(run())
