"""If this fails, a picture that users have is refused, read with wrong colours or orientation, or
reaches a decoder that is unsafe.
"""

import io
import os
import stat

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile
from support.scripts import within_s
from support.tiny_parts import write_png

from model.serving.web.conversation import check_image
from model.vision.pictures import FORMATS, open_image, picture_size

RED = (255, 0, 0)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
TIGHT = b"\0\0\0\x1cftyp"


def picture(colour=RED, size=(40, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def saved(kind: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A `gs` on PATH that leaves a file behind; the file's path."""
    folder, sprung = tmp_path / "bin", tmp_path / "sprung"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{sprung}'\n")
    (folder / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks once
    return sprung


def test_postscript_never_reaches_ghostscript(trap, tmp_path):
    with pytest.raises(Exception), Image.open(io.BytesIO(EPS)) as image:  # noqa: B017
        image.load()
    assert trap.exists(), "the trap does not work"
    trap.unlink()
    (tmp_path / "photo.png").write_bytes(EPS)
    for read in (
        lambda: open_image(tmp_path / "photo.png"),
        lambda: open_image(EPS),
        lambda: open_image(b"\xc5\xd0\xd3\xc6" + EPS),
        lambda: picture_size(EPS),
        lambda: check_image(tmp_path / "photo.png"),
    ):
        with pytest.raises(ValueError, match=r"it is PostScript \(EPS\); JPEG, PNG, .* are taken"):
            read()
    assert not trap.exists()


NOT_TAKEN = {
    "an icon (ICO or CUR)": lambda: saved("ICO"),
    "an icon (ICNS)": lambda: saved("ICNS"),
    "PPM or its like": lambda: saved("PPM"),
    "TGA": lambda: saved("TGA"),
    "PCX": lambda: saved("PCX"),
    "DDS": lambda: saved("DDS"),
    "SGI": lambda: saved("SGI"),
    "JPEG 2000": lambda: b"\0\0\0\x0cjP  \r\n\x87\n",
    "PDF": lambda: saved("PDF"),
    "PostScript (EPS)": lambda: saved("EPS"),
    "SVG": lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "an HTML page": lambda: b"\n<!DOCTYPE html><html>404</html>",
    "text": lambda: "not found: \u72d7".encode(),
    "a git-lfs pointer; run `git lfs pull`": lambda: b"version https://git-lfs.github.com/spec/v1",
    "a zip archive": lambda: b"PK\3\4" + bytes(60),
    "a video": lambda: TIGHT + b"isom\0\0\2\0isomiso2",
    "an empty file": lambda: b"",
    "of a kind that is not known here": lambda: bytes(range(200, 256)) * 3 + bytes(200),
    "HEIC": lambda: TIGHT + b"heic\0\0\0\0mif1heic",
    "AVIF": lambda: TIGHT + b"mif1\0\0\0\0mif1avifmiaf",
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_what_is_not_taken_is_named_and_no_decoder_sees_it(kind, tmp_path, monkeypatch):
    data = NOT_TAKEN[kind]()
    (tmp_path / "photo.png").write_bytes(data)
    Image.init()
    for name in Image.OPEN.keys() - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, name, (lambda *_: pytest.fail("decoded"), None))
    for read, source in (
        (open_image, data),
        (open_image, tmp_path / "photo.png"),
        (picture_size, str(tmp_path / "photo.png")),
        (check_image, tmp_path / "photo.png"),
    ):
        with pytest.raises(ValueError) as caught:
            read(source)
        message = str(caught.value)
        assert f"not a readable image (it is {kind}; " in message and "\n" not in message
        assert str(tmp_path) not in message
        advice = f"magick in.{kind.lower()} out.jpg" if kind in ("HEIC", "AVIF") else "are taken"
        assert advice in message


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis"])
def test_every_brand_of_heic_and_avif_is_known(brand):
    with pytest.raises(ValueError, match="it is AVIF" if brand[:3] == b"avi" else "it is HEIC"):
        open_image(TIGHT + brand + bytes(4) + brand)


def test_what_is_taken_is_told_by_its_bytes(tmp_path):
    for kind in (*FORMATS, "MPO"):
        options = {"save_all": True, "append_images": [picture((0, 0, 255))]}
        data = saved(kind, **(options if kind in ("MPO", "GIF", "WEBP", "TIFF") else {}))
        path = tmp_path / f"{kind}.heic"
        path.write_bytes(data)
        for source in (data, path, str(path)):
            opened = open_image(source)
            assert opened.mode == "RGB" and opened.size == picture_size(source) == (40, 32)
            assert np.abs(np.array(opened.getpixel((3, 3))) - RED).max() <= 3, kind


def test_a_decoded_picture_is_taken_whatever_it_was():
    with Image.open(io.BytesIO(saved("PPM"))) as image:
        assert open_image(image).getpixel((0, 0)) == RED


@pytest.mark.parametrize("read", [open_image, picture_size])
def test_only_a_regular_file_is_opened(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with within_s(5):
        for path in (tmp_path / "pipe.png", tmp_path, "/dev/null"):
            with pytest.raises(ValueError, match="a folder, FIFO or device"):
                read(path)
    for name in ("a\0.png", "a" * 999):
        with pytest.raises(ValueError, match="not a readable image"):
            read(tmp_path / name)


def test_size_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    write_png(tmp_path / "bomb.png", width=30_000, height=30_000)
    write_png(tmp_path / "wide.png", width=10_000, height=6000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    for read in (open_image, picture_size):
        with pytest.raises(ValueError, match="is over what Pillow decodes; scale it down"):
            read(tmp_path / "bomb.png")
        with pytest.raises(ValueError, match="is over 50,000,000 pixels"):
            read(tmp_path / "bomb.png", max_pixels=50_000_000)
        with pytest.raises(ValueError, match="10000x6000 is over 50,000,000 pixels"):
            read(tmp_path / "wide.png", max_pixels=50_000_000)
    assert picture_size(tmp_path / "wide.png") == (10_000, 6000)


def grey_ramp(mode: str) -> Image.Image:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    return Image.fromarray(values.astype(np.int32) if mode == "I" else values).convert(mode)


def palette_with_transparency() -> Image.Image:
    image = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = bytes([255] * 4)
    return image


def test_open_image_of_every_mode_is_rgb():
    red_modes = ["RGB", "RGBA", "CMYK", "YCbCr", "HSV", "P", "RGBX", "PA"]
    images = {m: picture().convert("RGBA" if m == "PA" else m).convert(m) for m in red_modes}
    images["P with transparency"] = palette_with_transparency()
    for mode, image in images.items():
        opened = open_image(image)
        assert opened.mode == "RGB" and opened.size == (40, 32)
        error = np.abs(np.asarray(opened, dtype=int) - np.array(RED)).max()
        assert error <= 3, mode
    for mode in ("L", "LA", "1", "I", "F", "I;16"):
        white = Image.new(mode, (8, 6), (255, 255) if mode == "LA" else 255)
        opened = open_image(white if mode != "1" else Image.new("1", (8, 6), 1))
        assert opened.mode == "RGB" and opened.size == (8, 6)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_open_image_scales_16_bits_to_8(mode):
    grey = np.asarray(open_image(grey_ramp(mode)))[..., 0].flatten()
    expected = np.linspace(0, 255, 64)
    assert np.abs(grey - expected).max() <= 1.5  # clipped, it would be white from value 256 on


def test_open_image_scales_floats_in_0_1():
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    grey = np.asarray(open_image(Image.fromarray(values)))[..., 0].flatten()
    assert np.abs(grey - np.linspace(0, 255, 16)).max() <= 1


def float_tiff(values) -> bytes:
    return saved("TIFF", Image.fromarray(np.asarray(values, dtype=np.float32)))


@pytest.mark.parametrize("peak", [1.0, 1.02, 2.0])
def test_float_tiff_with_lights_above_1_is_not_black(peak):
    values = np.linspace(0, peak, 64).reshape(8, 8)
    grey = np.asarray(open_image(float_tiff(values)))[..., 0]
    assert np.abs(grey - values.clip(0, 1) * 255).max() <= 1


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_float_tiff_is_black_only_where_it_is_not_finite(odd):
    values = np.linspace(0.2, 1, 64).reshape(8, 8)
    values[2, 3] = odd
    grey = np.asarray(open_image(float_tiff(values)))[..., 0]
    values[2, 3] = 0
    assert np.abs(grey - values * 255).max() <= 1


def test_float_tiff_of_other_scales():
    for peak, scale in ((255, 1), (65535, 1 / 257)):
        values = np.linspace(0, peak, 64).reshape(8, 8)
        grey = np.asarray(open_image(float_tiff(values)))[..., 0]
        assert np.abs(grey - values * scale).max() <= 1
    assert not np.asarray(open_image(float_tiff(np.full((4, 4), np.nan)))).any()


def test_open_image_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [picture(RED), picture((0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=50)
    opened = open_image(tmp_path / "a.gif")
    assert opened.mode == "RGB" and opened.getpixel((3, 3)) == RED


def test_open_image_turns_upright_by_exif():
    image = picture((0, 0, 255), size=(40, 20))
    image.paste(RED, (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the left half is the top
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    opened = open_image(file.getvalue())
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == RED and opened.getpixel((10, 35)) == (0, 0, 255)


def noise_bytes(kind: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_open_image_refuses_a_truncated_file(kind):
    data = noise_bytes(kind)
    open_image(data)
    for share in (0.0, 0.01, 0.3, 0.7):
        with pytest.raises(ValueError, match="not a readable image"):
            open_image(data[: int(len(data) * share)])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_open_image_survives_damaged_exif():
    """Whatever the EXIF block holds, the answer is a picture or a ValueError."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0100], exif[0x011A] = 6, "x" * 20, 40, 72.0
    file = io.BytesIO()
    picture().save(file, "JPEG", exif=exif)
    start = file.getvalue().index(b"Exif")
    for place in range(start + 16, start + 60):
        for value in range(14):  # the types a tag can have, and one that it cannot
            data = bytearray(file.getvalue())
            data[place] = value
            try:
                assert open_image(bytes(data)).mode == "RGB"
            except ValueError:
                pass


def test_open_image_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        open_image(tmp_path / "none.jpg")
