"""Owns the pictures of a source: reading them safely, and making them smaller."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dataset.records.images import open_images

MAX_PICTURE_BYTES = 1 << 28  # of a file: 256 MiB
DEFAULT_QUALITY = 90  # of the JPEG that a picture becomes where it is made smaller
# Encoded bytes and the most pixels -> the picture as training decodes it; raises ValueError.
OpenPicture = Callable[..., Image.Image]


class SourcePictures:
    """Pictures by name, in a folder or zip; nothing outside of it is opened.

    Args:
        path: None where a source has none.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._images = open_images(path)

    def exists(self, name: str) -> bool:
        return self._images is not None and self._images.exists(name)

    def read(self, name: str) -> bytes:
        """The bytes of a picture.

        Raises:
            ValueError: no such picture, one that lies outside, or one that cannot be read.
        """
        if self._images is None:
            raise ValueError(f"image {name[:80]!r}, but no --images_path was given")
        root = self._images.root
        try:
            if root.is_dir():
                _check_file(root, name)
            if not self._images.exists(name):
                raise ValueError(f"no such image {name[:80]!r} in {root}")
            return self._images.read(name)
        except OSError as error:
            raise ValueError(f"image {name[:80]!r} cannot be read ({error.strerror})") from error


def _check_file(root: Path, name: str) -> None:
    """Refuse a file outside of its folder, links followed, and one that is too large."""
    try:
        target = (root / name).resolve()
    except (ValueError, RuntimeError) as error:  # a NUL in the name; a link to itself
        raise ValueError(f"image {name[:80]!r} cannot be read ({error})") from error
    if not target.is_relative_to(root.resolve()):
        raise ValueError(f"image {name[:80]!r} leaves the folder of the images; it is not opened")
    if target.is_file() and target.stat().st_size > MAX_PICTURE_BYTES:
        raise ValueError(f"image {name[:80]!r} is over {MAX_PICTURE_BYTES:,} bytes")


@dataclass(frozen=True)
class Resizing:
    """How pictures are written.

    max_side: longer ones are made smaller; None leaves the size. jpeg_quality: all become JPEG of
    this quality; None keeps the file of a picture that keeps its size. max_pixels: a larger picture
    is refused before it is decoded.
    """

    max_side: int | None
    jpeg_quality: int | None
    max_pixels: int

    def apply(self, content: bytes, open_picture: OpenPicture) -> bytes:
        """An encoded picture as it is written.

        Raises:
            ValueError: it is broken, too large, or of a format that is not taken.
        """
        with warnings.catch_warnings():  # our own limit says more than Pillow's warning
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = open_picture(content, max_pixels=self.max_pixels)
        is_large = self.max_side is not None and max(picture.size) > self.max_side
        if is_large:
            assert self.max_side is not None
            picture.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        elif self.jpeg_quality is None:
            return content
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.jpeg_quality or DEFAULT_QUALITY)
        return file.getvalue()
