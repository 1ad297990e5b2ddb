"""Packages that a machine may lack: each costs only the tests that use it.

NPLLM_REQUIRE_ALL=1, as in CI, makes a missing one an error.  Those of SERVE and of LIVE, which CI
installs later, are errors where NPLLM_REQUIRE_SERVE=1 or NPLLM_REQUIRE_LIVE=1 as well.
"""

import importlib
import os

import pytest

REQUIRED = os.environ.get("NPLLM_REQUIRE_ALL") == "1"
REQUIRED_SERVE = os.environ.get("NPLLM_REQUIRE_SERVE") == "1"
REQUIRED_LIVE = os.environ.get("NPLLM_REQUIRE_LIVE") == "1"
LIVE = ("torch", "transformers", "jax", "onnx", "peft", "lm_eval", "compressed_tensors")
SERVE = ("starlette", "uvicorn", "openai", "httpx", "ray")
PACKAGES = (
    "array_api_strict",
    "click",
    "filelock",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "numba",
    "platformdirs",
    "threadpoolctl",
    "tqdm",
    *SERVE,
    *LIVE,
)
import_or_skip = pytest.importorskip


def may_be_missing(name):
    """Tell whether a missing package only skips tests where everything is required."""
    name = name.partition(".")[0]
    if name in SERVE:
        return not REQUIRED_SERVE
    return name in LIVE and not REQUIRED_LIVE


def import_or_fail(name, *args, **options):
    """What `pytest.importorskip` does where everything is required."""
    if may_be_missing(name):
        return import_or_skip(name, *args, **options)
    return importlib.import_module(name)


class _Missing:
    """What stands for a module that is missing: the test that uses it is skipped."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("__"):  # asked by pytest, when it names parameters
            raise AttributeError(attribute)
        return pytest.skip(f"{self._name} is not installed", allow_module_level=True)


def module(name):
    """Import a module, or return what skips the tests that use it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if REQUIRED and not may_be_missing(name):
            raise
        return _Missing(name)


def missing_package(error):
    """Name the package of PACKAGES whose absence caused an error; None for any other."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if (
            isinstance(error, ImportError)
            and name in PACKAGES
            and importlib.util.find_spec(name) is None
        ):
            return name
        error = error.__cause__
    return None


def invoke(arguments, **options):
    """Run the `npllm` command in this process, as click's CliRunner does."""
    testing = pytest.importorskip("click.testing")
    from npllm.cli.commands import main

    return testing.CliRunner().invoke(main, arguments, **options)
