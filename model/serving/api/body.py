"""Owns reading an API request's body: its content type, size limit and time limit."""

import anyio
from starlette.requests import Request

from model.serving.api.protocol.fields import ApiError

MAX_BODY_BYTES = 20 * 2**20
BODY_TIMEOUT_S = 60


async def read_body(request: Request, *, timeout_s: float = BODY_TIMEOUT_S) -> bytearray:
    """The body of a JSON request; reading stops as soon as it is too large.

    Raises:
        ApiError: 415 for another content type, 413 for too many bytes, 408 after `timeout_s`.
        starlette.requests.ClientDisconnect: before the end of the body.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the content type must be application/json")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    try:
        with anyio.fail_after(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(408, f"the body took more than {timeout_s:g} s to arrive") from None
    return body


def _too_large() -> ApiError:
    return ApiError(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
