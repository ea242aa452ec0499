"""Owns reading the body of a request to the API: its kind, its size, and how long it may take."""

import anyio
from starlette.requests import Request

from model.serving.api.request import ApiError

MAX_BODY_BYTES = 20 * 2**20
BODY_TIMEOUT_S = 60


async def read_body(request: Request, *, timeout_s: float = BODY_TIMEOUT_S) -> bytearray:
    """The body of a JSON request. What is too large is not read on.

    Raises:
        ApiError: 415 for another type, 413 for too many bytes, 408 for too slow a sender.
        starlette.requests.ClientDisconnect: the client left before the end.
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
