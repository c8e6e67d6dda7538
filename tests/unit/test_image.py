"""One image file: its pixels are what a viewer shows, or it is refused with the reason.

Pillow writes the files; levels are compared with arithmetic on what was written, orientations with
Pillow's own `exif_transpose`. TIFF files of kinds that Pillow cannot write are put together here.
"""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, features

from dist_adv.data.image import Framing, Unreadable, decode, extensions

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
LEVELS = np.arange(256).reshape(16, 16)


def saved(path: Path, image: Image.Image, **options) -> str:
    image.save(path, **options)
    return str(path)


def tiff(path: Path, pixels: bytes, bits: int, photometric: int, kind: int = 1) -> str:
    """A grey 16 x 16 TIFF file; photometric 0: white is 0. kind: 1 unsigned, 2 signed, 3 float."""
    tags = (
        *((256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 8)),
        *((277, 1), (278, 16), (279, len(pixels)), (339, kind)),
    )
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory)
    return str(path)


def packed_12_bits(values: np.ndarray) -> bytes:
    bits = "".join(f"{value:012b}" for value in values.flatten())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


# --- depth ---------------------------------------------------------------------------------------


def deep(path: Path, kind: str) -> str:
    """A ramp from black to white in 256 even steps, as a file of this kind."""
    words = np.rint(RAMP * 65535).astype(np.uint16)
    match kind:
        case "png":
            return saved(path / "x.png", Image.fromarray(words))
        case "tiff":
            return saved(path / "x.tif", Image.fromarray(words))
        case "tiff, compressed":
            return saved(path / "x.tif", Image.fromarray(words), compression="tiff_lzw")
        case "tiff, big-endian":
            picture = Image.frombytes("I;16B", (16, 16), words.astype(">u2").tobytes())
            return saved(path / "x.tif", picture)
        case "tiff, negative":
            return tiff(path / "x.tif", (65535 - words).tobytes(), 16, 0)
        case "tiff, 12 bits":
            return tiff(path / "x.tif", packed_12_bits(np.rint(RAMP * 4095).astype(int)), 12, 1)
        case "pgm":
            head = b"P5 16 16 65535\n"
            (path / "x.pgm").write_bytes(head + words.astype(">u2").tobytes())
            return str(path / "x.pgm")
        case "jpeg 2000":
            return saved(path / "x.jp2", Image.fromarray(words))
        case "float":
            return saved(path / "x.tif", Image.fromarray(RAMP.astype(np.float32)))
        case "float, negative":
            return tiff(path / "x.tif", (1 - RAMP).astype("<f4").tobytes(), 32, 0, 3)
    raise AssertionError(kind)


DEEP = [
    *("png", "tiff", "tiff, compressed", "tiff, big-endian", "tiff, negative", "tiff, 12 bits"),
    *("pgm", "float", "float, negative"),
    pytest.param(
        "jpeg 2000",
        marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="no JPEG 2000"),
    ),
]


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits(kind, tmp_path):
    """From black to white in 256 levels, and not saturated, dark or negative."""
    pixels = decode(deep(tmp_path, kind))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == np.repeat(LEVELS[..., None], 3, 2).tolist()


def integers_of_32_bits(path: Path) -> str:
    return saved(path / "x.tif", Image.fromarray(np.rint(RAMP * 65535).astype(np.int32)))


def signed_integers(path: Path) -> str:
    return tiff(path / "x.tif", np.rint(RAMP * 32767).astype("<i2").tobytes(), 16, 1, 2)


def floats(scale: float):
    def make(path: Path) -> str:
        return saved(path / "x.tif", Image.fromarray((RAMP * scale).astype(np.float32)))

    return make


def not_a_number(path: Path) -> str:
    return saved(path / "x.tif", Image.fromarray((RAMP * np.nan).astype(np.float32)))


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (integers_of_32_bits, "I"),
        (signed_integers, "I"),
        (floats(255), "F"),
        (floats(-1), "F"),
        (not_a_number, "F"),
    ],
)
def test_no_known_white(make, mode, tmp_path):
    with pytest.raises(Unreadable) as raised:
        decode(make(tmp_path))
    assert f"(Pillow's mode {mode})" in raised.value.what
    assert "8 or 16 bits" in raised.value.remedy


# --- colours and transparency --------------------------------------------------------------------


def colours() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "x.png"), ("L", "x.png"), ("1", "x.png"), ("P", "x.png"), ("CMYK", "x.tif")],
)
def test_opaque_modes_are_converted_as_pillow_does(mode, name, tmp_path):
    image = colours().convert(mode)
    assert decode(saved(tmp_path / name, image)).tolist() == (
        np.asarray(image.convert("RGB")).tolist()
    )


def half_transparent(mode: str, tmp_path: Path) -> str:
    """Two halves: the left one dark and shown, the right one of the same colour and not."""
    alpha = Image.new("L", (8, 4), 255)
    alpha.paste(0, (4, 0, 8, 4))
    dark = Image.new("RGB", (8, 4), (40, 40, 40))
    keyed = np.full((4, 8), 40)
    keyed[:, 4:] = 200
    match mode:
        case "RGBA":
            dark.putalpha(alpha)
            return saved(tmp_path / "x.png", dark)
        case "LA":
            grey = dark.convert("L")
            grey.putalpha(alpha)
            return saved(tmp_path / "x.png", grey)
        case "P":
            palette = Image.new("P", (8, 4), 0)
            palette.putpalette([40, 40, 40, 40, 40, 40])
            palette.paste(1, (4, 0, 8, 4))
            return saved(tmp_path / "x.png", palette, transparency=bytes([255, 0]))
        case "GIF":
            palette = Image.new("P", (8, 4), 0)
            palette.putpalette([40, 40, 40, 50, 60, 70])
            palette.paste(1, (4, 0, 8, 4))
            return saved(tmp_path / "x.gif", palette, transparency=1)
        case "L":
            return saved(tmp_path / "x.png", Image.fromarray(keyed.astype("u1")), transparency=200)
        case "RGB":
            image = Image.fromarray(keyed.astype("u1")).convert("RGB")
            return saved(tmp_path / "x.png", image, transparency=(200, 200, 200))
        case "I;16":
            words = (keyed * 257).astype(np.uint16)
            return saved(tmp_path / "x.png", Image.fromarray(words), transparency=200 * 257)
        case "WebP":
            dark.putalpha(alpha)
            return saved(tmp_path / "x.webp", dark, lossless=True, exact=True)
    raise AssertionError(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF", "L", "RGB", "I;16", "WebP"])
def test_what_is_transparent_is_white(mode, tmp_path):
    pixels = decode(half_transparent(mode, tmp_path))
    assert (pixels[:, :4] == 40).all()
    assert (pixels[:, 4:] == 255).all()


def test_half_of_a_colour_is_mixed_with_white(tmp_path):
    pixels = decode(saved(tmp_path / "x.png", Image.new("RGBA", (2, 2), (55, 155, 255, 51))))
    assert pixels[0, 0].tolist() == [215, 235, 255]  # a fifth of the colour


# --- orientation, frames -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_viewers_show_it(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / name, colours(), exif=exif)
    with Image.open(path) as picture:
        assert decode(path).tolist() == np.asarray(ImageOps.exif_transpose(picture)).tolist()
    assert decode(path).shape == ((12, 9, 3) if orientation < 5 else (9, 12, 3))


def test_damaged_exif_data_turn_nothing(tmp_path):
    path = saved(tmp_path / "x.jpg", colours(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with Image.open(path) as picture:
        assert decode(path).tolist() == np.asarray(picture).tolist()


@pytest.mark.parametrize("name", ["x.gif", "x.tif", "x.png", "x.webp", "x.jpg"])
def test_the_first_of_several_pictures(name, tmp_path):
    first, second = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    more = {"format": "MPO"} if name == "x.jpg" else {}
    path = saved(tmp_path / name, first, save_all=True, append_images=[second], **more)
    with Image.open(path) as picture:
        assert picture.n_frames == 2
    assert (decode(path) == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 7)])
def test_very_small_and_very_long(size, tmp_path):
    path = saved(tmp_path / "x.png", Image.new("RGB", size, "white"))
    assert decode(path).shape == (size[1], size[0], 3)
    assert (decode(path, Framing(16)) == np.full((16, 16, 3), 255)).all()


# --- what is not read ----------------------------------------------------------------------------


def test_postscript_does_not_reach_ghostscript(tmp_path, monkeypatch):
    """A stand-in for Ghostscript says that it was started; Pillow finds it when it is asked."""
    program, canary = tmp_path / "gs", tmp_path / "canary"
    program.write_text(f"#!/bin/sh\ntouch {canary}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "x.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(path) as picture:
        assert picture.format == "EPS"  # what Pillow makes of it by itself
    with pytest.raises(Unreadable, match="not a readable image"):
        decode(str(path))
    assert not canary.exists()


def test_a_file_of_too_many_pixels(tmp_path):
    """A header is enough: nothing of the size it promises is allocated."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(100)),
    )
    content = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(Unreadable, match=r"more than 178,956,970 pixels"):
        decode(str(tmp_path / "x.png"))


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP", "SPIDER"])
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    """Forty files of each kind with four bytes changed, under the name of an image."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path, draw, refused = tmp_path / "x.png", np.random.default_rng(0), 0
    image = colours().resize((32, 32))
    (image.convert("F") if kind == "SPIDER" else image).save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        for place in draw.integers(0, min(len(content), 600), 4):
            content[place] = draw.integers(256)
        path.write_bytes(content)
        try:
            assert decode(str(path)).dtype == np.uint8
        except Unreadable:
            refused += 1
    assert kind == "BMP" or refused
    assert kind != "SPIDER" or refused == 40, "a format that is not meant to be read"


def test_a_missing_file_is_no_damaged_one(tmp_path):
    with pytest.raises(Unreadable, match=r"cannot be read \(No such file or directory\)"):
        decode(str(tmp_path / "x.png"))


def test_the_usual_endings():
    usual = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    assert usual <= extensions()  # those that torchvision takes for images
    assert not extensions() & {".eps", ".ps", ".pdf", ".txt", ".db", ".wmf"}


def test_no_memory_is_no_damage(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", full)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(MemoryError):
        decode(str(tmp_path / "x.png"))
