"""Photos as people have them, decoded to one form: RGB, 8 bits, upright.

What is decided here, for every part of the system:
- EXIF's orientation is applied: height and width are those of the photo as it is looked at.
- Transparent pixels are shown on white, as a browser or a printed page does.
- 16-bit grey is scaled by 255 / 65535; 32-bit integers and floats, which have no fixed white, from their own darkest
  to their own brightest value.
- Of an animation or a multi-page file the first picture counts. Colour profiles are ignored: all is taken as sRGB.
- A photo is whole or unreadable: a truncated or damaged one is an error, never a picture that is grey below the cut.
- A photo may come from anyone: what its header declares is looked at before a pixel is decoded, and only readers of
  photo formats are let near it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from jaxtyping import Float, Integer, Shaped, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from freesolo.settings import DEFAULT_BOUNDS

MAX_PIXELS = DEFAULT_BOUNDS.max_pixels

# Pillow's own limit, of the whole process, only warns, and of less than a photo may have here. It is set above what
# any setting allows, where it still guards what Pillow allocates before it tells a photo's size.
_PILLOW_MAX_PIXELS = Image.MAX_IMAGE_PIXELS = 2**29

# Pillow reads forty formats by their content, among them EPS, for which it runs Ghostscript. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# A progressive JPEG is refined scan by scan, over all of its pixels each time: a kilobyte can say so a hundred times.
# Cameras and optimisers write about ten.
_MAX_SCANS = 64

# Some cameras leave a few bytes before the end marker; more of them mean that decoding lost its way in damaged data.
_HARMLESS_EXTRANEOUS_BYTES = 16

# A marker in a JPEG: neither a stuffed zero nor a restart, with any filling before it.
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")

# First bytes of a file -> the usual extension of its format.
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


class PhotoError(Exception):
    """A photo that cannot be read; says why in a few words."""


def file_extension(data: bytes) -> str:
    """The usual extension, without a dot, of the format that a photo's bytes are really in; `img` if unknown."""
    for signature, extension in _SIGNATURES:
        if data.startswith(signature):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "img"


def photo_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of the photo as it is looked at, read from its header alone.

    Args:
        data: The photo's file.
        max_pixels: A larger photo is refused.

    Raises:
        PhotoError: Empty, of no known format, or too large. A header that reads well does not vouch for the rest.
    """
    with _opened(data, max_pixels) as image:
        return _upright_size(image, _orientation(image))


def decode_photo(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    min_short_side: int | None = None,
    size: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode a photo to RGB.

    Args:
        data: The photo's file; its format is told by its content, not by any name.
        max_pixels: A larger photo is refused before any of it is decoded.
        min_short_side: Allow a JPEG to be decoded at a reduced size (at most half, in eighths, by libjpeg's scaled
            DCT), which is faster, as long as its short side keeps at least so many pixels. A smaller photo is never
            enlarged.
        size: Height and width that the photo must have, as its sample's record says, which takes the place of
            `max_pixels`. Masks would not fit another, which is refused before any of it is decoded.

    Raises:
        PhotoError: Empty, truncated, damaged, of no known format, too large, or of another size.
    """
    with _opened(data, max_pixels if size is None else _PILLOW_MAX_PIXELS) as image:
        orientation = _orientation(image)
        height, width = _upright_size(image, orientation)
        if size is not None and size != (height, width):
            raise PhotoError(f"{width} x {height} pixels, which is not the size of its record: {size[1]} x {size[0]}")
        pixels = None
        if image.format in ("JPEG", "MPO"):
            _check_scans(data)
            pixels = _decode_plain_jpeg(data, min_short_side)
        if pixels is None:
            image.load()
            pixels = _to_rgb(image)
    return np.ascontiguousarray(_turn_upright(pixels, orientation))


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """A photo whose header has been read; what goes wrong with it in the block is a `PhotoError`."""
    if not data:
        raise PhotoError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise PhotoError(
                    f"{image.width} x {image.height} pixels are more than bounds.max_pixels={max_pixels} allows"
                )
            yield image
    except (PhotoError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise PhotoError("not a photo in a format that can be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+", str(error))
        raise PhotoError(
            f"{count[0] if count else 'far'} pixels are more than bounds.max_pixels={max_pixels} allows"
        ) from error
    except Exception as error:
        # Pillow's readers raise whatever their parsing of a damaged file happens to: SyntaxError, struct.error, ...
        raise PhotoError(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8; 1 (upright) where there is none that makes sense."""
    # Pillow applies a TIFF's itself; a PNG's may follow its pixels, which must not be decoded to learn its size.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  a damaged EXIF block, of which Pillow raises as above, leaves a good photo
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Height and width as the photo is looked at."""
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _turn_upright(pixels: UInt8[np.ndarray, "H W 3"], orientation: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Undo how the camera was held: EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of more scans than any photo has."""
    # Also what follows a photo in its file, a film or another photo, may hold these bytes. NumPy, because `bytes.count`
    # takes a tenth of the time that decoding does.
    values = np.frombuffer(data, np.uint8)
    if np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)) <= _MAX_SCANS:
        return
    scans, place = 0, 2
    while marker := _MARKER.search(data, place):
        kind, place = marker[0][-1], marker.end()
        if kind == 0xD9:
            return
        if kind >= 0xC0 and kind != 0xD8:  # has a length, then its content; entropy-coded data has no such markers
            place += int.from_bytes(data[place : place + 2])
        scans += kind == 0xDA
        if scans > _MAX_SCANS:
            raise PhotoError(f"a JPEG of more than {_MAX_SCANS} scans: no photo, but a waste of time")


def _decode_plain_jpeg(data: bytes, min_short_side: int | None) -> UInt8[np.ndarray, "H W 3"] | None:
    """Decode with libjpeg-turbo; None where only Pillow can tell or do more."""
    least = min_short_side or 0
    fastest = 2 if least else 0  # libjpeg decodes at five to seven eighths more slowly than at full size
    try:
        pixels: UInt8[np.ndarray, "H W 3"] = simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=least, min_width=least, min_factor=fastest
        )
    except ValueError as error:
        reason = str(error)
        extraneous = re.search(r"(\d+) extraneous bytes", reason)
        if extraneous and int(extraneous[1]) <= _HARMLESS_EXTRANEOUS_BYTES:
            return None
        if "Premature end" in reason or "Corrupt JPEG data" in reason:
            raise PhotoError(f"truncated or damaged: {reason}") from error
        return None  # CMYK, or another unusual kind of JPEG
    return pixels


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(_scale_16_bits(np.asarray(image)))
    if image.mode in ("I", "F"):
        return _grey_to_rgb(_scale_own_range(np.asarray(image, dtype=np.float64)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _scale_16_bits(grey: Integer[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    return ((grey.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _scale_own_range(grey: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    finite = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0)
    darkest, brightest = finite.min(), finite.max()
    if darkest == brightest:
        return np.zeros(grey.shape, np.uint8)
    scaled: Float[np.ndarray, "H W"] = np.rint((finite - darkest) * (255.0 / (brightest - darkest)))
    return scaled.clip(0, 255).astype(np.uint8)


def _grey_to_rgb(grey: Shaped[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    return np.repeat(grey[:, :, None], 3, axis=2)
