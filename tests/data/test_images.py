"""Decoding: sizes against torchvision's transforms, every kind of pixel against its definition."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from bnexp.data.images import SUFFIXES, decode, read_image
from bnexp.errors import UserError

RNG = np.random.default_rng(0)


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


def grey_of(path: Path) -> np.ndarray:
    pixels = pixels_of(path)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


# ------------------------------------------------------------------------------------ their size


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (150, 37), (8, 8), (5, 4), (8, 300)])
@pytest.mark.parametrize("side", [8, 13])
def test_decoding_is_torchvisions_resize_and_center_crop(tmp_path, size, side):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    theirs = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    ours = decode(tmp_path / "image.png", (side, side), resize=True)
    np.testing.assert_array_equal(ours, np.array(theirs(Image.fromarray(pixels))))


def test_without_resizing_all_images_must_have_one_size(tmp_path):
    Image.new("RGB", (7, 9)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"odd.png has 7x9 pixels .* 8x8; set data.image_size"):
        decode(tmp_path / "odd.png", (8, 8), resize=False)


# --------------------------------------------------------------------------------- kinds of pixel


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_stay_so_in_every_mode(tmp_path, mode, value):
    path = tmp_path / ("i.tif" if mode == "CMYK" else "i.png")
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).convert(mode).save(path)
    decoded = decode(path, (4, 4), resize=False)
    assert decoded.shape == (4, 4, 3) and decoded.dtype == np.uint8 and (decoded == value).all()


def every_16_bit_value() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def eighth(values: np.ndarray, white: int) -> np.ndarray:
    """The nearest of 256 levels, by exact integers."""
    return ((values.astype(np.int64) * 510 + white) // (2 * white)).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_are_scaled_so_that_white_is_white(tmp_path, suffix):
    values, path = every_16_bit_value(), tmp_path / f"i{suffix}"
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(grey_of(path), eighth(values, 65535))


def tiff(path: Path, values: np.ndarray, **tags: int) -> None:
    """A little-endian, uncompressed TIFF written by hand: `tags` by number, as in t258=12."""
    height, width = values.shape
    data = values.tobytes()
    entries = {256: width, 257: height, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries |= {279: len(data)} | {int(name[1:]): value for name, value in tags.items()}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    directory = struct.pack("<H", len(entries)) + table + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


def test_16_bits_where_zero_is_white(tmp_path):
    values = every_16_bit_value()
    tiff(tmp_path / "i.tif", values, t258=16, t262=0)
    np.testing.assert_array_equal(grey_of(tmp_path / "i.tif"), 255 - eighth(values, 65535))


def test_12_bits(tmp_path):
    values = np.arange(4096, dtype=np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = np.stack(
        (pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255), axis=1
    ).astype(np.uint8)
    path = tmp_path / "i.tif"
    tiff(path, packed.reshape(64, 96), t256=64, t257=64, t258=12, t278=64)
    np.testing.assert_array_equal(grey_of(path).ravel(), eighth(values, 4095))


def test_a_pgm_of_few_levels_uses_them_all(tmp_path):
    values = np.arange(4096, dtype=">u2").reshape(64, 64)
    (tmp_path / "i.pgm").write_bytes(b"P5 64 64 4095\n" + values.tobytes())
    exact = values.astype(float) * 255 / 4095
    assert np.abs(grey_of(tmp_path / "i.pgm") - exact).max() <= 0.51  # Pillow makes 16 bits first


def test_floating_point_numbers_are_black_at_zero_and_white_at_one(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "f.tif")
    np.testing.assert_array_equal(grey_of(tmp_path / "f.tif").ravel(), np.arange(256))


@pytest.mark.parametrize(
    "values,message",
    [
        (np.array([[0, 300]], dtype=np.int32), r"32-bit pixels, from 0 to 300, which don't say"),
        (np.array([[-5, 70000]], dtype=np.int32), r"32-bit pixels, from -5 to 70000"),
        (np.array([[0, 255]], dtype=np.float32), r"pixels from 0 to 255, .* from 0 .* to 1"),
        (np.array([[-1, 1]], dtype=np.float32), r"pixels from -1 to 1, "),
        (np.array([[0, np.nan]], dtype=np.float32), r"pixels from nan to nan, "),
    ],
)
def test_a_range_that_does_not_say_what_is_white_is_refused(tmp_path, values, message):
    path = tmp_path / "i.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(UserError, match=message) as error:
        read_image(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_signed_bytes_are_refused(tmp_path):
    """Pillow reads -5 as 251."""
    tiff(tmp_path / "i.tif", np.array([[-5, 100]], dtype=np.int8), t258=8, t339=2)
    with pytest.raises(UserError, match=r"i.tif has signed 8-bit pixels, which don't say"):
        read_image(tmp_path / "i.tif")


# ----------------------------------------------------------------------- transparent and turned


def test_transparent_pixels_show_the_white_page(tmp_path):
    rgba = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "i.png")
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    shown = colour * alpha + 255 * (1 - alpha)
    assert np.abs(pixels_of(tmp_path / "i.png") - shown).max() <= 1


def test_a_drawing_in_black_on_nothing_is_seen(tmp_path):
    """Its colours alone are black everywhere."""
    drawing = np.zeros((8, 8, 2), dtype=np.uint8)
    drawing[2:5, 3:6, 1] = 255
    Image.fromarray(drawing, "LA").save(tmp_path / "i.png")
    np.testing.assert_array_equal(grey_of(tmp_path / "i.png"), 255 - drawing[..., 1])


@pytest.mark.parametrize("mode", ["P", "PA", "L", "RGB", "1"])
def test_a_transparent_colour_shows_the_white_page(tmp_path, mode):
    grey = np.zeros((4, 4), dtype=np.uint8)
    grey[0] = 255
    image = Image.fromarray(grey).convert("RGB" if mode == "RGB" else "L")
    if mode == "PA":
        image = image.convert("P").convert("PA")
        image.putalpha(0)
        image.save(tmp_path / "i.tif")
        assert (grey_of(tmp_path / "i.tif") == 255).all()
        return
    image = image.convert(mode)
    black = {"P": image.getpixel((0, 3)), "RGB": (0, 0, 0)}.get(mode, 0)
    image.save(tmp_path / "i.png", transparency=black)
    assert (grey_of(tmp_path / "i.png") == 255).all()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bits: int, colour_type: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


@pytest.mark.parametrize(
    "bits,colour_type,row,transparent,shown",
    [
        (2, 0, bytes([0b00_01_10_11]), (1,), [0, 255, 170, 255]),
        (4, 0, bytes([0x05, 0xAF]), (5,), [0, 255, 170, 255]),
        (16, 0, struct.pack(">4H", 0, 257, 30 * 257, 65535), (0,), [255, 1, 30, 255]),
        (16, 0, struct.pack(">4H", 0, 257, 30 * 257, 65535), (30 * 257,), [0, 1, 255, 255]),
        (16, 2, struct.pack(">12H", *3 * [0], *3 * [512], *6 * [0x8000]), 3 * (0x8000,),
         [0, 2, 255, 255]),
    ],
)  # fmt: skip
def test_a_transparent_colour_is_meant_in_the_bits_of_the_file(
    tmp_path, bits, colour_type, row, transparent, shown
):
    path, colour = tmp_path / "i.png", struct.pack(f">{len(transparent)}H", *transparent)
    path.write_bytes(
        png_header(4, 1, bits, colour_type)
        + png_chunk(b"tRNS", colour)
        + png_chunk(b"IDAT", zlib.compress(b"\0" + row))
        + png_chunk(b"IEND", b"")
    )
    assert grey_of(path).tolist() == [shown]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_images_are_turned_as_exif_says(tmp_path, orientation, suffix):
    """By the definition: row and column 0 are at (top, left), (top, right), ..."""
    stored = np.zeros((8, 16, 3), dtype=np.uint8)
    stored[:4, :8], stored[4:, 8:] = 255, 128
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"i{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if suffix == ".jpg" else {}))
    shown = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.abs(pixels_of(path).astype(int) - shown).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_uncompressed_grey_images_are_turned_too(tmp_path, dtype, orientation):
    """Pillow maps such files into memory, and mixes up the rows of those on their side."""
    stored = np.arange(0, 256, 2).reshape(8, 16).astype(dtype) * (257 if dtype is np.uint16 else 1)
    tiff(tmp_path / "i.tif", stored, t258=stored.itemsize * 8, t274=orientation)
    levels = np.arange(0, 256, 2).reshape(8, 16).T
    shown = levels[:, ::-1] if orientation in (6, 7) else levels
    shown = shown[::-1] if orientation in (7, 8) else shown
    np.testing.assert_array_equal(grey_of(tmp_path / "i.tif"), shown)


def test_16_bits_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 3
    values = every_16_bit_value()
    Image.fromarray(values).save(tmp_path / "i.png", exif=exif)
    np.testing.assert_array_equal(grey_of(tmp_path / "i.png"), eighth(values[::-1, ::-1], 65535))


def test_damaged_exif_data_are_passed_over(tmp_path):
    stored = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(stored).save(tmp_path / "i.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels_of(tmp_path / "i.png"), stored)


# --------------------------------------------------------------------------------------- refusals


def test_an_image_too_large_for_pillow_is_one_line(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(20_000, 20_000, 8, 0) + png_chunk(b"IDAT", b""))
    with pytest.raises(UserError, match=r"huge.png is larger than the [\d,]+ pixels .*scale it"):
        read_image(path)


@pytest.mark.filterwarnings("ignore")
def test_whatever_a_decoder_raises_is_one_line_about_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    whole = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(whole, "TIFF")
    contents = whole.getvalue()
    damaged = [contents[:length] for length in range(0, len(contents), 3)]
    for _ in range(500):
        changed = bytearray(contents)
        changed[RNG.integers(len(changed))] = RNG.integers(256)
        damaged.append(bytes(changed))
    path, refused = tmp_path / "i.tif", 0
    for contents in damaged:
        path.write_bytes(contents)
        try:
            read_image(path)
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > 50


def test_every_suffix_is_one_that_pillow_knows():
    Image.init()
    assert SUFFIXES - {".avif"} <= set(Image.registered_extensions())
