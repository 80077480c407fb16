"""Photos as people have them, decoded to one form."""

from __future__ import annotations

# First bytes of a file -> the usual extension of its format.
_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)


def file_extension(data: bytes) -> str:
    """The usual extension, without a dot, of the format that a photo's bytes are really in; `img` if unknown."""
    for signature, extension in _SIGNATURES:
        if data.startswith(signature):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "img"
