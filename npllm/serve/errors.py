"""What a client is refused, in OpenAI's form."""

from typing import Any

from npllm.continuous_batching.errors import EndedError, ExpiredError, QueueFullError
from npllm.errors import NpllmError, NpllmValueError

__all__ = ["Refusal", "as_refusal", "body_of"]

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


CODES: dict[type[Exception], tuple[str, int]] = {
    QueueFullError: ("queue_full", 429),
    ExpiredError: ("timeout", 504),
    EndedError: ("shutting_down", 503),
}


def as_refusal(error: Exception) -> Exception:
    """Return what a client may see of an error: one of npllm's own, else that there was one."""
    if type(error) in CODES:
        code, status = CODES[type(error)]
        seconds = getattr(error, "seconds", None)
        headers = {"Retry-After": str(seconds)} if seconds else None
        return Refusal(str(error), code=code, status=status, headers=headers)
    if isinstance(error, NpllmError):
        return error
    return Refusal(f"internal error ({type(error).__name__})", code="internal", status=500)


def body_of(error: Exception) -> dict[str, Any]:
    """Return the body of an answer that reports an error."""
    status = getattr(error, "status", 400)
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    return {
        "error": {
            "message": _encodable(str(error)),
            "type": kind,
            "param": _encodable(getattr(error, "param", None)),
            "code": getattr(error, "code", None),
        }
    }


def _encodable(text: str | None) -> str | None:
    """A text that UTF-8 can write: lone surrogates, which JSON may hold, as escapes."""
    return text and text[:1000].encode("utf-8", "backslashreplace").decode()
