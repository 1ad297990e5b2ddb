"""The pytest plugin: `pytest --npllm-op my_module:my_attention`, and its fixtures.

Little is imported until a fixture is used, since pytest loads this in every run on a machine where
npllm is installed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

__all__ = ["npllm_check", "npllm_op", "pytest_addoption", "pytest_collection_modifyitems"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that name the function under test."""
    group = parser.getgroup("npllm", "a function against npllm's definitions")
    group.addoption("--npllm-op", metavar="MODULE:FUNCTION", help="the function under test")
    group.addoption("--npllm-op-name", metavar="OP", help="its operation [from its name]")
    group.addoption("--npllm-library", help="of its arrays [it has the signature of npllm.ops]")
    group.addoption("--npllm-layout", default="b h n d", help="of q, k, v and the result")
    group.addoption("--npllm-mask", default="bool", help="what it takes as a mask")


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the check of the function under test, unless a test that was collected runs it."""
    if not config.getoption("npllm_op"):
        return
    if any("npllm_check" in getattr(item, "fixturenames", ()) for item in items):
        return
    items.append(LawItem.from_parent(session, name=f"npllm check {config.getoption('npllm_op')}"))


class LawItem(pytest.Item):
    """The check of the function under test, as a test of its own."""

    def runtest(self) -> None:
        """Run the check."""
        fn, op = _under_test(self.config)
        _checked(op, fn)()

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """Show what the law says, without the stack of the search."""
        from npllm.testing import LawBroken

        if isinstance(excinfo.value, LawBroken):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Say where the test stands."""
        return self.path, None, self.name


def _under_test(config: pytest.Config) -> tuple[Callable, str]:
    """The function that the options name, and its operation."""
    from npllm.errors import NpllmValueError
    from npllm.testing import adapt
    from npllm.testing.mutation import under_test
    from npllm.testing.naming import function_named, op_in

    text = config.getoption("npllm_op")
    if not text:
        raise NpllmValueError("the fixtures need the option --npllm-op MODULE:FUNCTION")
    fn, op = function_named(text), config.getoption("npllm_op_name") or op_in(text)
    library = config.getoption("npllm_library")
    if library is None:
        return under_test(fn, op), op
    options = {name: config.getoption(f"npllm_{name}") for name in ("layout", "mask")}
    return adapt(fn, op, library=library, **options), op


def _checked(op: str, fn: Callable) -> Callable:
    from npllm import testing

    return partial(testing.check_decoder, fn) if op == "decoder" else partial(testing.check, op, fn)


@pytest.fixture
def npllm_op(request: pytest.FixtureRequest) -> Callable:
    """The function under test, with the signature of its operation."""
    return _under_test(request.config)[0]


@pytest.fixture
def npllm_check(request: pytest.FixtureRequest) -> Callable:
    """A function that checks it: `npllm_check(max_examples=100)`, options as in `check`."""
    fn, op = _under_test(request.config)
    return _checked(op, fn)
