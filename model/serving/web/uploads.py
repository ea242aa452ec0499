"""Owns uploads: pictures within the quota, checked, converted to a format that browsers show.

It replaces Gradio's own upload, which reads a whole body before it checks anything, leaves a
partial file when the client disconnects, and keeps files that are not pictures.
"""

import asyncio
import html
import shutil
from pathlib import Path
from typing import BinaryIO

import anyio
from gradio_client.utils import strip_invalid_filename_characters
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive

from model.serving.web.conversation import MAX_UPLOAD_BYTES, check_image
from model.serving.web.errors import reason
from model.serving.web.protection.quota import LEAST_BYTES, OverQuota, Quota
from model.serving.web.text import page_language, text
from model.vision.pictures import open_image

MAX_FILES = 20  # chosen at once; a question takes fewer
MAX_FORM_BYTES = MAX_FILES * MAX_UPLOAD_BYTES
NUM_DECODED = 2  # pictures decoded at once: one of the largest takes 150 MB
SILENCE_S = 30  # without a byte: the client counts as gone
SHOWN = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP"}  # formats that every browser shows


class _Silent(OSError):
    """The client has sent nothing for `SILENCE_S`."""


class Uploads:
    """Takes `multipart/form-data` with `files`, as Gradio's page sends it."""

    def __init__(self, quota: Quota):
        self._quota = quota
        self._decoding = anyio.CapacityLimiter(NUM_DECODED)

    async def take(self, request: Request, visitor: str) -> Response:
        """The paths of the stored files as a JSON list, or a refusal that the page shows.

        All files are stored or none: after a failure or disconnect, files and quota are as before.
        """
        language = page_language(request.headers.get("accept-language"))
        charged = _Charged(self._quota, visitor, request.client.host if request.client else "")
        stored: list[Path] = []
        try:
            declared = request.headers.get("content-length", "")
            if declared.isdecimal() and int(declared[:15]) > MAX_FORM_BYTES:
                raise OverQuota(f"more than {MAX_FORM_BYTES >> 20} MB at once")
            counted = Request(request.scope, charged.counting(request.receive))
            async with counted.form(max_files=MAX_FILES, max_fields=MAX_FILES) as form:
                files = [f for f in form.getlist("files") if isinstance(f, UploadFile)]
                if not files:
                    raise ValueError("no file")
                for file in files:
                    charged.add(LEAST_BYTES)
                    folder = self._quota.new_folder(visitor)
                    stored.append(folder)
                    path = await anyio.to_thread.run_sync(
                        _store, file.file, file.filename or "", folder, limiter=self._decoding
                    )
                    charged.add(path.stat().st_size - (file.size or 0))
                    stored[-1] = path
            charged.settle()
            return JSONResponse([str(path) for path in stored])
        except OverQuota as error:
            return _refusal(413, error, language)
        except HTTPException as error:  # Starlette's, for a malformed form
            return _refusal(error.status_code, error.detail, language)
        except ValueError as error:
            return _refusal(400, error, language)
        except _Silent as error:
            return _refusal(408, error, language)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            if not charged.is_settled:
                await anyio.to_thread.run_sync(_delete, stored, abandon_on_cancel=False)
                charged.give_back()


class _Charged:
    """Bytes of one request, charged to a visitor; to be given back unless settled."""

    def __init__(self, quota: Quota, visitor: str, address: str):
        self._quota, self._visitor, self._address = quota, visitor, address
        self._num_bytes, self.is_settled = 0, False

    def add(self, num_bytes: int) -> None:
        self._quota.charge(self._visitor, self._address, num_bytes)
        self._num_bytes += num_bytes

    def settle(self) -> None:
        self.is_settled = True

    def give_back(self) -> None:
        if self._visitor in self._quota:
            self._quota.charge(self._visitor, self._address, -self._num_bytes)

    def counting(self, receive: Receive) -> Receive:
        """A `receive` that charges each piece before passing it on."""

        async def counted() -> Message:
            try:
                message = await asyncio.wait_for(receive(), SILENCE_S)
            except TimeoutError:
                raise _Silent(f"nothing came for {SILENCE_S} s") from None
            self.add(len(message.get("body", b"")))
            return message

        return counted


def _store(file: BinaryIO, name: str, folder: Path) -> Path:
    """Write one picture, converted to PNG where browsers would not show it.

    Raises:
        ValueError: it is not a picture that the page takes.
    """
    name = strip_invalid_filename_characters(Path(name.replace("\\", "/")).name).strip(". ")
    path = folder / (name or "picture")
    with path.open("wb") as target:
        shutil.copyfileobj(file, target)
    check_image(path)
    with Image.open(path) as image:
        is_shown = image.format in SHOWN
    if not is_shown:
        shown = path.with_name(f"{path.stem}.png")
        open_image(path).save(shown, "PNG")
        if shown != path:
            path.unlink()
        path = shown
    return path


def _delete(stored: list[Path]) -> None:
    for path in stored:
        shutil.rmtree(path if path.is_dir() else path.parent, ignore_errors=True)


def _refusal(status: int, error: Exception | str, language: str) -> Response:
    """A message for the page, escaped since Gradio renders it as HTML."""
    message = html.escape(text("not_taken", language, error=reason(error, language)))
    return PlainTextResponse(message, status_code=status)
