"""Owns the picture that stands in a Parquet file where a record has none: 8x8 and all black."""

import io

from PIL import Image

STAND_IN_SIZE = (8, 8)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # those that pictures are taken in


def is_stand_in(image: bytes) -> bool:
    """Whether an encoded picture is 8x8 and all black. One of another size is not decoded, and one
    that cannot be read is none."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as picture:
            if picture.size != STAND_IN_SIZE:
                return False
            extrema = picture.convert("RGB").getextrema()
    except Exception:  # decoders raise almost anything on damaged data; the reader names the fault
        return False
    return all(band == (0, 0) for band in extrema)
