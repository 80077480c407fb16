"""Messy photos: each is decoded as people see it, or refused whole with the reason."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from freesolo.data.photos import PhotoError, decode_photo, file_extension, photo_size


def scene(height: int = 48, width: int = 80) -> np.ndarray:
    """A smooth picture with a different colour in each corner, so that every turn of it looks different."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 255 * rows / (height - 1)
    green = 255 * columns / (width - 1)
    blue = 127 + 127 * np.sin(rows / 7) * np.cos(columns / 5)
    return np.stack((red, green, blue), axis=2).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(pixels: np.ndarray | None = None, **options: object) -> bytes:
    return encode(Image.fromarray(scene() if pixels is None else pixels), "JPEG", **({"quality": 92} | options))


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def difference(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_plain_jpegs_decode_as_pillow_decodes_them(subsampling: str, progressive: bool) -> None:
    data = jpeg(subsampling=subsampling, progressive=progressive)
    decoded = decode_photo(data)
    assert decoded.shape == (48, 80, 3)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert difference(decoded, by_pillow(data)) <= 2
    assert difference(decoded, scene()) < 40


def test_grey_jpegs() -> None:
    data = encode(Image.fromarray(scene()).convert("L"), "JPEG", quality=95)
    decoded = decode_photo(data)
    assert difference(decoded, by_pillow(data)) <= 1
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_cmyk_jpegs_are_not_negatives() -> None:
    data = encode(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95)
    assert difference(decode_photo(data), scene()) < 40


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_other_formats(kind: str) -> None:
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    picture = Image.fromarray(scene() // 128 * 255)  # eight colours, which a GIF's palette keeps
    decoded = decode_photo(encode(picture, kind, **options))
    np.testing.assert_array_equal(decoded, np.asarray(picture))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(Image.fromarray(scene()), kind, exif=exif, **options)
    # Written out, not computed: (height, width) and what the photo's top left and bottom right corners become.
    red, cyan, green, black = (255, 0), (255, 255), (0, 255), (0, 0)  # red and green: bottom left, b. right, t. right
    corners = {
        1: (black, cyan),
        2: (green, red),
        3: (cyan, black),
        4: (red, green),
        5: (black, cyan),
        6: (red, green),
        7: (cyan, black),
        8: (green, red),
    }[orientation]
    decoded = decode_photo(data)
    expected_size = (80, 48) if orientation >= 5 else (48, 80)
    assert decoded.shape[:2] == expected_size
    assert photo_size(data) == expected_size
    assert difference(decoded[0, 0, :2], np.array(corners[0])) < 15
    assert difference(decoded[-1, -1, :2], np.array(corners[1])) < 15
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert difference(decoded, upright) <= 2


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_means_nothing_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(exif=exif)
    assert decode_photo(data).shape == (48, 80, 3)
    assert photo_size(data) == (48, 80)


def test_a_damaged_exif_block_does_not_cost_the_photo() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(exif=exif.tobytes()[:9] + b"\xff" * 20)
    assert decode_photo(data).shape == (48, 80, 3)
    assert photo_size(data) == (48, 80)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896], [40000, 65278, 65535]], np.uint16)
    decoded = decode_photo(encode(Image.fromarray(values), "PNG"))
    # 257 levels of 16 bits are one of 8: 40000 / 257 = 155.6
    np.testing.assert_array_equal(decoded[..., 0], [[0, 1, 128], [156, 254, 255]])
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])
    big_endian = encode(Image.fromarray(values.astype(">u2")), "TIFF")
    np.testing.assert_array_equal(decode_photo(big_endian), decoded)


def test_sixteen_bit_rgb_is_scaled_not_clipped() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = np.array([[0, 32896, 65535], [40000, 257, 514]], ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )
    assert difference(decode_photo(data), np.array([[[0, 128, 255], [156, 1, 2]]])) <= 1


def test_wide_integers_and_floats_span_their_own_range() -> None:
    values = np.array([[-1000, 0], [500, 1000]])
    expected = [[0, 128], [191, 255]]  # (0 + 1000) / 2000 * 255 = 127.5; 1500 / 2000 * 255 = 191.25
    for wide in (values.astype(np.int32), (values / 7).astype(np.float32)):
        decoded = decode_photo(encode(Image.fromarray(wide), "TIFF"))
        assert difference(decoded[..., 1], np.array(expected)) <= 1
    flat = decode_photo(encode(Image.fromarray(np.full((2, 2), 5.0, np.float32)), "TIFF"))
    assert not flat.any()
    holes = np.array([[np.nan, 1.0], [np.inf, 0.0]], np.float32)
    np.testing.assert_array_equal(decode_photo(encode(Image.fromarray(holes), "TIFF"))[..., 0], [[0, 255], [0, 0]])


def test_transparency_is_shown_on_white() -> None:
    alpha = np.array([[0, 255], [51, 102]], np.uint8)
    pixels = np.dstack((np.full((2, 2), 200, np.uint8), np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), alpha))
    decoded = decode_photo(encode(Image.fromarray(pixels), "PNG"))
    # white * (1 - a) + colour * a with a = 0, 1, 0.2, 0.4
    assert difference(decoded[0, 0], np.array([255, 255, 255])) == 0
    assert difference(decoded[0, 1], np.array([200, 0, 0])) == 0
    assert difference(decoded[1, 0], np.array([244, 204, 204])) <= 1
    assert difference(decoded[1, 1], np.array([233, 153, 153])) <= 1
    grey = decode_photo(encode(Image.fromarray(pixels).convert("LA"), "PNG"))
    assert difference(grey[0, 0], np.array([255, 255, 255])) == 0


def test_palettes_with_and_without_transparency() -> None:
    indices = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    indices.putpalette([10, 20, 30, 255, 0, 0, 0, 0, 255])
    np.testing.assert_array_equal(
        decode_photo(encode(indices, "PNG")), [[[10, 20, 30], [255, 0, 0]], [[0, 0, 255], [255, 0, 0]]]
    )
    np.testing.assert_array_equal(
        decode_photo(encode(indices, "PNG", transparency=1))[:, 1], [[255, 255, 255], [255, 255, 255]]
    )


def test_one_bit_pictures() -> None:
    data = encode(Image.fromarray(np.array([[True, False]])), "PNG")
    np.testing.assert_array_equal(decode_photo(data)[..., 0], [[255, 0]])


def test_a_one_pixel_photo() -> None:
    data = encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    np.testing.assert_array_equal(decode_photo(data), [[[9, 8, 7]]])
    assert photo_size(data) == (1, 1)
    assert decode_photo(jpeg(np.zeros((1, 1, 3), np.uint8)), min_short_side=100).shape == (1, 1, 3)


def test_the_first_picture_of_an_animation() -> None:
    first, second = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    data = encode(first, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(decode_photo(data)[0, 0], [255, 0, 0])


def test_names_do_not_matter_only_content() -> None:
    """A PNG called .jpg: there is no name here to be misled by, and the stored extension is the real one."""
    picture = Image.fromarray(scene())
    kinds = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
    for kind, extension in kinds.items():
        assert file_extension(encode(picture, kind)) == extension
    assert file_extension(b"") == "img"
    assert file_extension(b"RIFF....WAVE") == "img"


@pytest.mark.parametrize("read", [decode_photo, photo_size])
def test_no_bytes_at_all(read: object) -> None:
    assert callable(read)
    with pytest.raises(PhotoError, match=r"^empty file$"):
        read(b"")


@pytest.mark.parametrize("data", [b"hello", b"\xff\xd8\xff", b"\0" * 1000, b"<svg></svg>", b"GIF89a"])
def test_what_is_no_photo(data: bytes) -> None:
    with pytest.raises(PhotoError, match=r"not a photo in a format that can be read|damaged"):
        decode_photo(data)
    with pytest.raises(PhotoError):
        photo_size(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.4, 0.9])
def test_a_truncated_photo_is_an_error_and_not_half_a_picture(kind: str, kept: float) -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(PhotoError, match=r"truncated|damaged"):
        decode_photo(data[: int(len(data) * kept)])


def test_a_jpeg_whose_middle_is_lost_is_an_error() -> None:
    data = jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    middle = len(data) // 2
    for damaged in (data[:middle] + data[-2:], data[:middle] + bytes(middle - 2) + data[-2:]):
        assert by_pillow(damaged).shape == (64, 64, 3)  # Pillow would have shown half of it
        with pytest.raises(PhotoError, match="truncated or damaged"):
            decode_photo(damaged)


def test_the_harmless_bytes_that_some_cameras_leave_are_forgiven() -> None:
    data = jpeg()
    decoded = decode_photo(data[:-2] + b"\0\0\0" + data[-2:])
    assert difference(decoded, decode_photo(data)) <= 2
    np.testing.assert_array_equal(decode_photo(data + b"trailing bytes"), decode_photo(data))


def test_a_header_reads_well_in_a_truncated_photo() -> None:
    assert photo_size(jpeg()[:700]) == (48, 80)


def test_png_damage_is_told() -> None:
    data = bytearray(encode(Image.fromarray(scene()), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(PhotoError, match="damaged"):
        decode_photo(bytes(data))


def test_absurd_sizes_are_refused_before_they_are_decoded() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side in (12_000, 60_000):  # the second is beyond what Pillow itself takes for a bomb
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        started = time.perf_counter()
        with pytest.raises(PhotoError, match=r"too large|pixels are more than"):
            decode_photo(bomb)
        assert time.perf_counter() - started < 1
    with pytest.raises(PhotoError, match=r"80 x 48 pixels are more than bounds\.max_pixels=3839 allows"):
        decode_photo(jpeg(), max_pixels=48 * 80 - 1)
    assert decode_photo(jpeg(), max_pixels=48 * 80).shape == (48, 80, 3)


def test_forty_megapixels() -> None:
    data = jpeg(np.zeros((5000, 8000, 3), np.uint8))
    assert photo_size(data) == (5000, 8000)
    assert decode_photo(data).shape == (5000, 8000, 3)
    assert decode_photo(data, min_short_side=800).shape == (1250, 2000, 3)


@pytest.mark.parametrize(
    ("size", "least", "decoded"),
    [
        # eighths of 480 x 640, up to half of it: 60, 120, 180, 240
        ((480, 640), 60, (60, 80)),
        ((480, 640), 61, (120, 160)),
        ((480, 640), 224, (240, 320)),
        ((640, 480), 121, (240, 180)),
        ((640, 480), 241, (640, 480)),
        ((480, 640), 480, (480, 640)),
        ((480, 640), 800, (480, 640)),
    ],
)
def test_reduced_decoding_never_goes_below_what_is_asked(
    size: tuple[int, int], least: int, decoded: tuple[int, int]
) -> None:
    data = jpeg(scene(*size))
    assert decode_photo(data, min_short_side=least).shape == (*decoded, 3)


def test_reduced_decoding_looks_the_same_and_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = decode_photo(jpeg(scene(480, 640), exif=exif))
    reduced = decode_photo(jpeg(scene(480, 640), exif=exif), min_short_side=240)
    assert reduced.shape == (320, 240, 3)
    resized = np.asarray(Image.fromarray(whole).resize((240, 320), Image.Resampling.BOX))
    assert difference(reduced, resized) < 12


def test_other_formats_ignore_the_reduced_size() -> None:
    data = encode(Image.fromarray(scene()), "PNG")
    assert decode_photo(data, min_short_side=8).shape == (48, 80, 3)


def test_a_png_that_tells_its_orientation_late_is_taken_as_it_is_consistently() -> None:
    """EXIF after the pixels: not looked for, because a size must be known without decoding."""
    info = PngImagePlugin.PngInfo()
    exif = Image.Exif()
    exif[0x0112] = 6
    info.add(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"), after_idat=True)
    data = encode(Image.fromarray(scene()), "PNG", pnginfo=info)
    assert photo_size(data) == decode_photo(data).shape[:2] == (48, 80)


# --- photos of bad actors -------------------------------------------------------------------------------------------


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG that says it is of another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def test_a_jpeg_that_says_it_is_huge_is_refused_by_number_and_setting() -> None:
    bomb = with_size(jpeg(), 65500, 65500)
    assert len(bomb) < 3000
    for read in (photo_size, decode_photo):
        with pytest.raises(PhotoError, match=r"^4290250000 pixels are more than bounds\.max_pixels=128000000 allows$"):
            read(bomb)


def test_a_hundred_megapixels_are_a_photo() -> None:
    # Its header alone: pixels of that many would only be slow.
    assert photo_size(with_size(jpeg(), 8660, 11560)) == (8660, 11560)


def test_a_photo_of_another_size_than_its_record_is_refused_before_it_is_decoded() -> None:
    bomb = with_size(jpeg(), 11000, 11000)
    with pytest.raises(PhotoError, match=r"^11000 x 11000 pixels, which is not the size of its record: 80 x 48$"):
        decode_photo(bomb, size=(48, 80))
    assert decode_photo(jpeg(), size=(48, 80)).shape == (48, 80, 3)
    assert decode_photo(jpeg(), max_pixels=1, size=(48, 80)).shape == (48, 80, 3)  # the record's was looked at
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode_photo(jpeg(exif=turned), size=(80, 48)).shape == (80, 48, 3)


def progressive_bomb(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes over and over."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    assert decode_photo(jpeg(progressive=True)).shape == (48, 80, 3)
    with pytest.raises(PhotoError, match="a JPEG of more than 64 scans"):
        decode_photo(progressive_bomb(1000))


def test_what_follows_a_photo_in_its_file_is_not_counted() -> None:
    film = b"\xff\xda" * 100
    assert decode_photo(jpeg() + film).shape == (48, 80, 3)
    thumbnail = b"\xff\xe5" + struct.pack(">H", len(film) + 2) + film
    assert decode_photo(jpeg()[:2] + thumbnail + jpeg()[2:]).shape == (48, 80, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n",
        b"P6 2 2 255\n" + bytes(12),
        b"8BPS\0\1" + bytes(100),
    ],
    ids=["EPS, which runs Ghostscript", "PPM", "PSD"],
)
def test_only_formats_of_photos_are_read(data: bytes) -> None:
    with pytest.raises(PhotoError, match="not a photo in a format that can be read"):
        decode_photo(data)
