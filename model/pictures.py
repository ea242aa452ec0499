"""Owns reading pictures: which kinds are taken, and how any of them becomes upright 8-bit RGB.

A kind is told by a file's first bytes, never by its name. What is not taken is named from those
bytes alone: no decoder sees it, and for PostScript Pillow's is a foreign program (Ghostscript).
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow opens an MPO by its JPEG reader
TAKEN = "JPEG, PNG, WebP, GIF, BMP and TIFF are taken"
CONVERT = (
    "convert it to JPEG: `magick in.{0} out.jpg` (ImageMagick), or on macOS "
    "`sips -s format jpeg in.{0} --out out.jpg`"
)
HEAD_BYTES = 4096
MAX_ASPECT = 100  # the shorter side becomes the tower's: a thinner image would fill the memory
# Floats are 0 to 1, with lights a little above it, or 0 to 255: read as the latter, a picture with
# nothing above 2 would be black to any eye.
MAX_UNIT_PEAK = 2.0
EXIF_TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
KINDS = {  # what a file that is not taken is -> how it begins; the first that fits
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


def open_image(
    source: Image.Image | bytes | str | Path, *, max_pixels: int | None = None
) -> Image.Image:
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
    """Width and height in pixels as the head says; nothing is decoded. Raises as `open_image`."""
    with _opened(source, max_pixels=max_pixels) as image:
        return image.size


@contextmanager
def _opened(source: bytes | str | Path, *, max_pixels: int | None) -> Iterator[Image.Image]:
    """A picture of which no more than the head has been read, of a kind and size that are taken."""
    with _file(source) as file:
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


def _file(source: bytes | str | Path) -> io.BufferedIOBase:
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
    raise _unreadable("a folder, FIFO or device, not a file")  # a FIFO would be waited for


def _unreadable(why) -> ValueError:
    return ValueError(f"not a readable image ({why})")


def kind_of(head: bytes) -> str:
    """What a file that is not taken is, by its first bytes, and what to do about it."""
    fits = (kind for kind, begins in KINDS.items() if re.match(begins, head, re.DOTALL))
    kind = next(fits, "of a kind that is not known here")
    return f"{kind}; {CONVERT.format(kind.lower()) if kind in ('HEIC', 'AVIF') else TAKEN}"


def _decode(image: Image.Image) -> Image.Image:
    """The picture upright, decoded; a lazily opened one is read here."""
    try:
        image.load()
    except Exception as error:  # decoders raise almost anything on damaged data
        raise _unreadable(error) from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise _unreadable(f"{image.width}x{image.height} is too thin")
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF tag says; a damaged tag says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises several unrelated errors here
        return image
    turn = EXIF_TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Integers of more than 8 bits, or floats, of which what is not finite is black."""
    values = np.asarray(image, dtype=np.float32)
    values = np.where(np.isfinite(values), values, 0)
    peak = values.max(initial=0.0)
    is_16_bit = image.mode.startswith("I;16") or peak > 255
    is_unit = image.mode == "F" and peak <= MAX_UNIT_PEAK
    scale = 1 / 257 if is_16_bit else 255.0 if is_unit else 1.0
    return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
