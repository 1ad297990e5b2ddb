"""Who may ask, and how: API keys, hosts, the type and size of a body."""

from __future__ import annotations  # starlette may be a stand-in while the reference is built

import asyncio
import hmac
import ipaddress
from typing import Any

from starlette.requests import Request

from npllm.config.strict_json import parse_json
from npllm.errors import NpllmError, NpllmValueError
from npllm.serve.errors import Refusal

__all__ = ["check_host", "check_key", "is_loopback", "read_body", "require_key", "require_sendable"]

BODY_SECONDS = 60.0  # for a whole body to arrive


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_key(host: str, key: str | None) -> None:
    """Raise where others could reach a server that asks for no key.

    Raises
    ------
    NpllmValueError
    """
    if not is_loopback(host) and key is None:
        raise NpllmValueError(
            f"--host {host} can be reached from other machines: give --api-key, or set "
            "NPLLM_API_KEY; without a key the server binds to 127.0.0.1 only"
        )


def require_sendable(key: str | None) -> str | None:
    """Return a key that a header can carry.

    Raises
    ------
    NpllmValueError
        For an empty one, and for characters that clients encode differently.
    """
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise NpllmValueError(
            "the API key must be printable ASCII characters and not empty; without --api-key and "
            "NPLLM_API_KEY the server asks for none"
        )
    return key


def check_key(header: str, key: str | None) -> None:
    """Raise unless an Authorization header carries the key; the comparison takes constant time."""
    if key is None:
        return
    kind, _, given = header.partition(" ")
    same = hmac.compare_digest(given.strip().encode(), key.encode())
    if not (same and kind.lower() == "bearer"):
        raise Refusal(
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            status=401,
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_host(header: str, key: str | None) -> None:
    """Raise where a page of another site asks by a name that it lets point here: without a key the
    Host must be a loopback address or localhost.

    Notes
    -----
    Source: "Protecting Browsers from DNS Rebinding Attacks" (Jackson et al. 2007).
    """
    host = header if header.endswith("]") else header.rsplit(":", 1)[0]
    if key is None and not is_loopback(host):
        raise Refusal(
            "without an API key the Host must be localhost or a loopback address",
            code="invalid_host",
            status=403,
        )


async def read_body(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read the JSON object of a request.

    Raises
    ------
    Refusal
        When it is too large, no JSON object, of another type, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            "Content-Type must be application/json", code="unsupported_media_type", status=415
        )
    try:
        text = await asyncio.wait_for(_text(request, max_bytes), BODY_SECONDS)
        return parse_json(text, "the body")
    except TimeoutError:
        raise Refusal(
            f"the body did not arrive within {BODY_SECONDS:g} s", code="timeout", status=408
        ) from None
    except Refusal:
        raise
    except (NpllmError, UnicodeDecodeError) as error:
        raise Refusal(str(error), code="invalid_json") from None


async def _text(request: Request, max_bytes: int) -> str:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise Refusal(
                f"the body has more than {max_bytes} bytes", code="body_too_large", status=413
            )
    return body.decode("utf-8")
