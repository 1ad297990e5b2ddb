"""What a client is refused, in OpenAI's form."""

from typing import Any

from npllm.errors import NpllmError, NpllmValueError

__all__ = ["Refusal", "as_refusal", "body_of", "expired", "queue_full", "shutting_down"]

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(NpllmValueError):
    """A request that is not answered.

    Parameters
    ----------
    message : str
    param : str, optional
        The parameter at fault.
    code : str, optional
        A word for programs.
    status : int
        Of HTTP.
    headers : dict, optional
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.param, self.code, self.status, self.headers = param, code, status, headers


def as_refusal(error: Exception) -> Exception:
    """Return what a client may see of an error: one of npllm's own, else that there was one."""
    if isinstance(error, NpllmError):
        return error
    return Refusal(f"internal error ({type(error).__name__})", code="internal", status=500)


def body_of(error: Exception) -> dict[str, Any]:
    """Return the body of an answer that reports an error."""
    status = getattr(error, "status", 400)
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def queue_full(n: int, seconds: int) -> Refusal:
    """Say that too many sequences wait."""
    return Refusal(
        f"{n} sequences wait already; try again in {seconds} s",
        code="queue_full",
        status=429,
        headers={"Retry-After": str(seconds)},
    )


def expired(seconds: float) -> Refusal:
    """Say that an answer took too long."""
    return Refusal(f"the answer took more than {seconds:g} s", code="timeout", status=504)


def shutting_down() -> Refusal:
    """Say that the server ends."""
    return Refusal("the server is shutting down", code="shutting_down", status=503)
