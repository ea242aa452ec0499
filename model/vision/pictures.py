"""Owns reading pictures: which file formats are taken, and how each becomes upright 8-bit RGB.

The format is recognised by the file's first bytes, never by its name. A file of another format is
named in the error from those bytes alone and never decoded: Pillow would run Ghostscript, a foreign
program, for PostScript.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Picture = Image.Image | bytes | str | Path  # decoded, encoded, or a file

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens an MPO by its JPEG reader
TAKEN = "JPEG, PNG, WebP, GIF, BMP and TIFF are taken"
CONVERT = (
    "convert it to JPEG: `magick in.{0} out.jpg` (ImageMagick), or on macOS "
    "`sips -s format jpeg in.{0} --out out.jpg`"
)
HEAD_BYTES = 4096
# The shorter side is resized to the tower's: a thinner image would become too large for the memory.
MAX_ASPECT = 100
# A float image holds values of 0 to 1 (with highlights a little above 1) or of 0 to 255. With a
# peak up to 2 it is the former: as the latter it would look black.
MAX_UNIT_PEAK = 2.0
EXIF_TRANSPOSES = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIGNATURES = {  # what a file that is not taken is -> its first bytes; the first match counts
    "an empty file": rb"\Z",
    "a damaged JPEG": rb"\xff\xd8\xff",
    "a damaged PNG": rb"\x89PNG",
    "a damaged WebP": rb"RIFF....WEBP",
    "a damaged GIF": rb"GIF8[79]a",
    "a damaged BMP": rb"BM....\x00\x00\x00\x00",
    "a damaged TIFF": rb"II[*+]\x00|MM\x00[*+]",
    "PostScript (EPS)": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF-",
    "AVIF": rb"....ftyp(?:avi[fs]|(?:mif1|msf1)....(?:....)*?avi[fs])",
    "HEIC": rb"....ftyp(?:he[ivm][cxms]|heif|mif1|msf1)",
    "a video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
    "JPEG 2000": rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\x00\x00\x00\x0cJXL ",
    "an icon (ICO or CUR)": rb"\x00\x00[\x01\x02]\x00[^\x00]",
    "an icon (ICNS)": rb"icns",
    "DDS": rb"DDS ",
    "Photoshop's PSD": rb"8BPS",
    "QOI": rb"qoif",
    "SGI": rb"\x01\xda[\x00\x01][\x01\x02]",
    "PCX": rb"\x0a[\x00\x02\x03\x05][\x00\x01]",
    "PPM or its like": rb"P[1-7fFy]\s",
    "a zip archive": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
    "compressed by gzip": rb"\x1f\x8b",
    "a git-lfs pointer; run `git lfs pull`": rb"version https://git-lfs",
    "SVG": rb"(?i:(?:\xef\xbb\xbf)?\s*(?:<\?xml.*)?<svg)",
    "an HTML page": rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html))",
    "TGA": rb".[\x00\x01][\x01-\x03\x09-\x0b].{13}[\x08\x0f\x10\x18\x20]",
    "text": rb"[\t\n\r\x20-\x7e\x80-\xff]+\Z",
}


def open_image(source: Picture, *, max_pixels: int | None = None) -> Image.Image:
    """Any picture as 8-bit RGB, upright by its EXIF tag, the first frame of an animation.

    16-bit grey is scaled to 8 bits (PIL's own conversion would clip it to white).

    Args:
        source: a PIL image is taken whatever file it comes from; bytes and files are JPEG (MPO),
            PNG, WebP, GIF, BMP or TIFF.
        max_pixels: a larger picture is refused before it is decoded; None leaves it to Pillow.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a picture, broken or too large.
    """
    if isinstance(source, Image.Image):
        _check_size(source, max_pixels)
        return _to_rgb(_decode(source))
    with _opened(source, max_pixels=max_pixels) as image:
        return _to_rgb(_decode(image))


def picture_size(source: bytes | str | Path, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height in pixels, read from the header alone. Raises as `open_image`."""
    with _opened(source, max_pixels=max_pixels) as image:
        return image.size


@contextmanager
def _opened(source: bytes | str | Path, *, max_pixels: int | None) -> Iterator[Image.Image]:
    """A picture of a format and size that are taken, of which only the header has been read."""
    with _open_file(source) as file:
        head = file.read(HEAD_BYTES)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise _unreadable(f"it is {kind_of(head)}") from None
        except Image.DecompressionBombError as error:
            limit = f"{max_pixels:,} pixels" if max_pixels else "what Pillow decodes"
            raise _unreadable(f"it is over {limit}; scale it down") from error
        except Exception as error:  # decoders raise almost anything on damaged data
            raise _unreadable(error) from error
        _check_size(image, max_pixels)
        yield image


def _check_size(image: Image.Image, max_pixels: int | None) -> None:
    if max_pixels is not None and image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise _unreadable(f"{size} is over {max_pixels:,} pixels; scale it down")


def _open_file(source: bytes | str | Path) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    try:
        if path.is_file() or not path.exists():
            return path.open("rb")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        raise _unreadable(getattr(error, "strerror", None) or error) from error
    raise _unreadable("a folder, FIFO or device, not a file")  # opening a FIFO would block


def _unreadable(why: str | Exception) -> ValueError:
    return ValueError(f"not a readable image ({why})")


def kind_of(head: bytes) -> str:
    """What a file that is not taken is, by its first bytes, and what to do about it."""
    matches = (kind for kind, begins in SIGNATURES.items() if re.match(begins, head, re.DOTALL))
    kind = next(matches, "of a kind that is not known here")
    return f"{kind}; {CONVERT.format(kind.lower()) if kind in ('HEIC', 'AVIF') else TAKEN}"


def _decode(image: Image.Image) -> Image.Image:
    """Decode a picture that Pillow opened lazily, and make it upright."""
    try:
        image.load()
    except Exception as error:  # decoders raise almost anything on damaged data
        raise _unreadable(error) from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise _unreadable(f"{image.width}x{image.height} is too thin")
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged tag counts as none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises several unrelated errors here
        return image
    transpose = EXIF_TRANSPOSES.get(orientation)
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Integers of more than 8 bits, or floats; values that are not finite become black."""
    values = np.asarray(image, dtype=np.float32)
    values = np.where(np.isfinite(values), values, 0)
    peak = values.max(initial=0.0)
    is_16_bit = image.mode.startswith("I;16") or peak > 255
    is_unit = image.mode == "F" and peak <= MAX_UNIT_PEAK
    scale = 1 / 257 if is_16_bit else 255.0 if is_unit else 1.0
    return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
