"""The members of a shard's tar, as a stream: plain files named `<key>.<extension>`, and nothing else.

tarfile itself would follow links and extended headers (PAX, GNU's long names, sparse files) to whatever size, depth and
place in the stream they say. A shard of ours has none, so that whatever has one is refused where it stands.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from freesolo.data.documents import short

# tarfile moves what is left of its buffer at each read: of a large one that is more than it reads.
_BUFFER_BYTES = 2**16
# A key and an extension, not a path: nothing that a file system or a URL would follow.
_NAME = re.compile(r"([A-Za-z0-9_-]{1,200})\.([a-z0-9]{1,8})")
_NOT_OURS = "was this packed by freesolo?"

DAMAGED = (tarfile.TarError, ValueError, OverflowError)
"""What `read_members` raises: tarfile has the latter two for numbers and names in a header that are none."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in the tar, which is where the stream stands.

    Attributes:
        key: Its name before the dot.
        extension: After it.
        size: Bytes, as declared; the tar's own size bounds it.
    """

    key: str
    extension: str
    size: int
    _body: io.BufferedReader

    def read(self) -> bytes:
        """The whole file; to be called before the next member is asked for, and once."""
        return self._body.read()


def read_members(stream: io.RawIOBase, size: int) -> Iterator[Member]:
    """The members of a tar in order, each to be read or passed over; in constant memory.

    Args:
        stream: Of the tar, from its beginning.
        size: Bytes that the stream has.

    Raises:
        tarfile.TarError, ValueError, OverflowError: Truncated, not a tar, or with a member that is no plain file, has a
            name that is a path, or declares more bytes than there are.
    """
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER_BYTES, tarinfo=_PlainFile) as tar:
        for header in tar:
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps a record of all that it has read
            name = _NAME.fullmatch(header.name)
            if name is None:
                raise tarfile.ReadError(f"{short(header.name)} is not a sample's name; {_NOT_OURS}")
            if header.offset_data + header.size > size:  # tarfile would look for the next one out there
                raise tarfile.ReadError(f"{header.name} declares {header.size} bytes, more than the shard has")
            yield Member(name[1], name[2], header.size, cast(io.BufferedReader, tar.extractfile(header)))


class _PlainFile(tarfile.TarInfo):
    """A member's header, of a plain file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _PlainFile:
        """Parse a header's block.

        Raises:
            tarfile.ReadError: A link, a device, a folder, an extended header, or a size below 0.
        """
        header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.size < 0:
            raise tarfile.ReadError(f"{short(header.name)} is not a plain file; {_NOT_OURS}")
        return header
