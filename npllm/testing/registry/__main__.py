"""Write docs/conventions.md: `python -m npllm.testing.registry [PATH]`."""

import sys
from pathlib import Path

from npllm.testing.registry.page import conventions_page

if len(sys.argv) > 1:
    Path(sys.argv[1]).write_text(conventions_page(), encoding="utf-8")
else:
    sys.stdout.write(conventions_page())
