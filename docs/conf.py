"""Settings of the documentation site; `scripts/docs.sh` builds it.

Pages are Markdown (MyST) in this folder.  The API reference is generated from the docstrings, the
command reference from the parser of the `npllm` command.  Nothing is fetched.
"""

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import npllm  # noqa: E402

project = "npllm"
author = "the authors of npllm"
version = release = npllm.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "numpydoc",
    "sphinx_click",
    "myst_nb",
    "extension",
]
exclude_patterns = ["templates"]

html_theme = "furo"
html_title = f"npllm {release}"
html_show_copyright = False

# pages
myst_heading_anchors = 3  # for links to a section

# notebooks are stored without outputs; the build executes them
nb_execution_mode = os.environ.get("NPLLM_DOCS_NOTEBOOKS", "force")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_show_tb = True
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])

# API reference: a page a module, which sphinx-apidoc writes with the templates in this folder
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have types with axes
autodoc_mock_imports = [
    name
    for name in ("torch", "starlette", "uvicorn", "lm_eval")
    if importlib.util.find_spec(name) is None
]
numpydoc_show_class_members = False

# `name` in a docstring is a link where something has that name, else code
default_role = "py:obj"
nitpick_ignore_regex = [("py:.*", r"(?s)(?!npllm(\.\w+)+$).*")]  # a full name must exist
