"""What every test shares: options, markers, Hypothesis profiles, and the default checkpoint."""

import gc
import os
import sys

import compile_once
import numpy as np
import optional
import planted_in_ops
import pytest
import seeds
from hypothesis import HealthCheck, settings

EXAMPLES = {"default": 20, "all": 50, "thorough": 1000}  # "all": with --all


if optional.REQUIRED:
    pytest.importorskip = optional.import_or_fail


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests marked slow, and more examples of the others",
    )
    parser.addoption(
        "--without-numba", action="store_true", help="as on a machine where Numba is not installed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    seeds.settle_seed(config)
    profile = "all" if config.getoption("--all") else "default"
    name = os.environ.get("HYPOTHESIS_PROFILE", profile)
    settings.register_profile(
        name,
        deadline=None,
        max_examples=EXAMPLES[name],
        derandomize=seeds.run_seed() == seeds.FIXED,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile(name)
    if config.getoption("--without-numba"):
        sys.modules["numba"] = None  # an import of it now fails
    keep_byte_code()
    if "PYTEST_XDIST_WORKER" in os.environ:
        compile_once.share_compilations()
    planted_in_ops.plant_named_bug()


def keep_byte_code():
    """Let Python keep byte code in `__pycache__`, as it does unless PYTHONDONTWRITEBYTECODE is set:
    tests start a hundred processes, and without it each compiles the package again.
    """
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# Files whose tests compile nearly every kernel.  They come first: of two workers one then compiles
# while the other, which begins in the middle, runs what compiles little and finds the rest on disk.
COMPILING = ("test_kernels_extremes.py", "test_kernels_layouts.py", "test_kernels.py")


def pytest_report_header():
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    blas = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".rstrip()
    return f"numpy {np.__version__}, BLAS {blas}, NPLLM_TEST_SEED={seeds.run_seed()}"


def pytest_terminal_summary(terminalreporter):
    if seeds.run_seed() != seeds.FIXED:
        terminalreporter.write_line(f"NPLLM_TEST_SEED={seeds.run_seed()} repeats this run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if {"default_model", "default_folder"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("weights")
    items.sort(key=lambda item: item.path.name not in COMPILING)
    wanted = {"slow": config.getoption("--all"), "gpu": "gpu" in config.getoption("markexpr")}
    kept, left_out = [], []  # left out rather than skipped: a thousand skips would cost seconds
    for item in items:
        runs = all(wanted[name] or not item.get_closest_marker(name) for name in wanted)
        (kept if runs else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collection makes many objects and no garbage: a sixth of its time is the collector's."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """Ten thousand tests are many objects: the garbage collector need not visit them again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """A test that needs a package which this machine lacks is skipped, unless everything is
    required.
    """
    try:
        return (yield)
    except ImportError as error:
        name = optional.missing_package(error)
        if name is None or (optional.REQUIRED and not optional.may_be_missing(name)):
            raise
        pytest.skip(f"{name} is not installed")


@pytest.fixture(autouse=True)
def _device_where_asked_for(request):
    """A test marked gpu runs only when it was asked for; then a missing device is an error."""
    if request.node.get_closest_marker("gpu"):
        from npllm.arrays import backend_namespace

        backend_namespace("cupy")


@pytest.fixture(scope="session", autouse=True)
def _no_line_about_compiling():
    """Commands in this process do not say that kernels are compiled: that depends on which test
    comes first.
    """
    from npllm.kernels import compilation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "announce", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _searches_for_broken_laws_start_from_the_seed_of_the_run():
    """`npllm.testing.check_*` without a seed draws one: here that of the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.randbelow", lambda limit: seeds.run_seed() % limit)
        yield


@pytest.fixture(scope="module")
def on_the_stand_in():
    """CuPy's stand-in for a file of tests, with kernels that run on the processor."""
    import kernel_shim

    with pytest.MonkeyPatch.context() as patch:
        kernel_shim.installed(patch)
        yield patch


@pytest.fixture(scope="module")
def on_the_stand_in_apart(on_the_stand_in):
    """The same, with arrays that lie apart, so that no place behind one is in another."""
    import guard

    on_the_stand_in.setattr(guard, "APART", True)


@pytest.fixture(scope="module")
def on_tensor_cores(on_the_stand_in, on_the_stand_in_apart):  # noqa: ARG001
    """The same, as on a device with tensor cores."""
    from npllm.kernels.cuda import launching

    on_the_stand_in.setattr(launching, "has_tensor_cores", lambda: True)


@pytest.fixture(scope="session")
def default_folder():
    """Folder of the default checkpoint, fetched on first use."""
    from npllm.checkpoints.fetch import fetch

    return fetch(progress=False)


@pytest.fixture(scope="session")
def default_model(default_folder):
    """The default checkpoint, as `npllm.load()` gives it."""
    import npllm

    return npllm.load(default_folder)


@pytest.fixture(scope="session")
def traced_peak():
    """Run a function; return the largest number of bytes that it held at a time."""
    import tracemalloc

    def peak(function):
        function()  # what is made once, at the first call, does not count
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return peak
