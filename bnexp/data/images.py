"""Image files: which there are, and their pixels as they are displayed on a white page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from bnexp.errors import UserError
from bnexp.printable import printable

# fmt: off
SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))
# fmt: on
"""Of the files that are read as images, in lower case. Fixed, whatever Pillow was built with, so
that the same folder is the same data everywhere."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # in TIFF
_SAMPLE_FORMAT, _SIGNED = 339, 2
_ORIENTATION = 0x112  # in EXIF


def decode(path: Path, image_size: tuple[int, int], resize: bool) -> np.ndarray:
    """The image at `path` as RGB, uint8 (height, width, 3); see `read_image`.

    With `resize`, its shorter side is scaled (bilinear, antialiased) so that it just covers
    `image_size`, and the middle is cut out; without, it must already have that size. Raises
    UserError with the file's name when it can't be decoded or has another size.
    """
    image = read_image(path)
    height, width = image_size
    if resize:
        covering = (
            max(width, image.width * height // image.height),
            max(height, image.height * width // image.width),
        )
        image = image.resize(covering, Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    elif (image.height, image.width) != image_size:
        raise UserError(
            f"{printable(path)} has {image.width}x{image.height} pixels and the first image has "
            f"{width}x{height}; set data.image_size to bring all to one size"
        )
    return np.array(image)


def read_image(path: Path) -> Image.Image:
    """The (first) image in a file, in mode RGB, turned as its EXIF data say, on white where it is
    transparent.

    16 bits a pixel become 8 (white, 65535, stays white), floating-point numbers are black at 0 and
    white at 1. Raises UserError with the file's name for files that can't be decoded, and for
    pixels in a range that does not say what is white.
    """
    try:
        # Not by its name: of what it then maps into memory, Pillow 13 mixes up turned pixels.
        with path.open("rb") as opened, Image.open(opened) as file:
            return _rgb(file, path)
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{printable(path)} can't be decoded (cannot identify image file); replace or remove it"
        ) from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{printable(path)} is larger than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels "
            "that Pillow decodes; scale it down"
        ) from None
    except Exception as error:  # damaged files make decoders fail in any way
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{printable(path)} can't be read: {error.strerror}") from None
        reason = str(error).replace(str(path), "").strip(" '\"") or type(error).__name__
        raise UserError(
            f"{printable(path)} can't be decoded ({printable(reason)}); replace or remove it"
        ) from None


def _rgb(file: ImageFile.ImageFile, path: Path) -> Image.Image:
    kind, tags = file.format, getattr(file, "tag_v2", {})
    if kind == "PNG" and file.tile:
        _bring_transparent_colour_to_8_bits(file)
    image = ImageOps.exif_transpose(file) if _is_turned(file) else file
    if image.mode == "L" and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise UserError(
            f"{printable(path)} has signed 8-bit pixels, which don't say what is white; save it "
            "with unsigned ones"
        )
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(image, kind, tags, path))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image.convert("RGBA"))
    return image.convert("RGB")


def _bring_transparent_colour_to_8_bits(file: ImageFile.ImageFile) -> None:
    """Pillow scales a PNG's pixels, but not the colour that it says is transparent. (16 bits of
    grey stay as they are until `_eight_bits`.)"""
    bits, colour = file.tile[0][3], file.info.get("transparency")
    if isinstance(colour, int) and bits in ("L;2", "L;4"):
        file.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[bits]
    elif isinstance(colour, tuple) and bits == "RGB;16B":
        file.info["transparency"] = tuple(value >> 8 for value in colour)


def _is_turned(file: Image.Image) -> bool:
    try:
        return file.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF data in an image that is whole
        return False


def _eight_bits(image: Image.Image, kind: str | None, tags: Any, path: Path) -> np.ndarray:
    """A grey image of more than 8 bits a pixel, as uint8 (height, width)."""
    pixels = np.asarray(image).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F":
        white = 1.0
    elif image.mode.startswith("I;16"):
        white = 2.0 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    elif kind in ("PNG", "PPM"):  # older Pillows' mode for 16 bits
        white = 65535.0
    else:
        raise UserError(
            f"{printable(path)} has 32-bit pixels, from {low:.0f} to {high:.0f}, which don't say "
            "what is white; save it with 8 or 16 bits a pixel"
        )
    if not (low >= 0 and high <= white):  # also where they are NaN
        raise UserError(
            f"{printable(path)} has pixels from {low:g} to {high:g}, which are read from 0 (black) "
            f"to {white:g} (white); bring them into that range"
        )
    grey = np.rint(pixels * (255 / white))
    if kind == "PNG" and "transparency" in image.info:
        grey[pixels == image.info["transparency"]] = 255
    return (255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey).astype(np.uint8)
