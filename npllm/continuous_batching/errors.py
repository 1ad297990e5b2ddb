"""Why the engine gives no answer."""

from npllm.errors import NpllmRuntimeError

__all__ = ["EndedError", "ExpiredError", "QueueFullError"]


class QueueFullError(NpllmRuntimeError):
    """Too many jobs wait.

    Parameters
    ----------
    n_waiting : int
    seconds : int
        When to try again.
    """

    def __init__(self, n_waiting: int, seconds: int):
        super().__init__(f"{n_waiting} sequences wait already; try again in {seconds} s")
        self.seconds = seconds


class ExpiredError(NpllmRuntimeError):
    """An answer took too long."""

    def __init__(self, seconds: float):
        super().__init__(f"the answer took more than {seconds:g} s")


class EndedError(NpllmRuntimeError):
    """The engine has ended."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")
