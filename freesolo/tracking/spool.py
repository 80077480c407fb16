"""What waits to be sent, on this machine's disk, so that waiting costs no memory and survives the process."""

from __future__ import annotations

import json
import shutil
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

Bulk = bytes | UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]


@dataclass(frozen=True, slots=True)
class Parcel:
    """One thing to send.

    Attributes:
        number: Its place in the order of arrival.
        content: Plain JSON that says what it is; "kind" names it.
        payload: A folder with the one file or folder that belongs to it, or None.
    """

    number: int
    content: dict[str, Any]
    payload: Path | None


class Spool:
    """A first-in first-out queue of parcels in a folder, bounded in number and bytes.

    One thread may put while another takes. A folder that an earlier process left is continued.
    """

    def __init__(self, folder: Path, *, max_parcels: int = 20_000, max_bytes: int = 512 * 2**20) -> None:
        """Open the queue in `folder`, which is made if need be.

        Args:
            folder: Of this queue alone.
            max_parcels: More are refused.
            max_bytes: A payload that would bring all payloads above it is refused.
        """
        self._folder = folder
        self._max_parcels = max_parcels
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting = deque(sorted(int(file.stem) for file in folder.glob("*.json")))
        self._next = self._waiting[-1] + 1 if self._waiting else 0
        self._bytes = {number: _size(self._payload(number)) for number in self._waiting}

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, content: dict[str, Any], payload: Bulk | Path | None = None) -> bool:
        """Add a parcel.

        Args:
            content: Plain JSON.
            payload: Bytes (kept as `bytes`), pixels (kept as `pixels.npy`), or a file or folder, copied under its name.

        Returns:
            False where the queue is full and the parcel was not taken.
        """
        with self._lock:
            size = _size(payload)
            if len(self._waiting) >= self._max_parcels or sum(self._bytes.values()) + size > self._max_bytes:
                return False
            number, self._next = self._next, self._next + 1
            _store(self._payload(number), payload)
            # The content goes last, by rename: what a killed process left half-written is not a parcel.
            unfinished = self._folder / f"{number:08d}.part"
            unfinished.write_text(json.dumps(content), encoding="utf-8")
            unfinished.rename(self._content(number))
            self._bytes[number] = size
            self._waiting.append(number)
            return True

    def first(self) -> Parcel | None:
        """The parcel that has waited longest; None where none waits."""
        with self._lock:
            if not self._waiting:
                return None
            number = self._waiting[0]
        payload = self._payload(number)
        content = json.loads(self._content(number).read_text(encoding="utf-8"))
        return Parcel(number, content, payload if payload.exists() else None)

    def remove(self, parcel: Parcel) -> None:
        """Forget a parcel, which `first` gave."""
        with self._lock:
            self._waiting.remove(parcel.number)
            self._bytes.pop(parcel.number)
        self._content(parcel.number).unlink()
        if parcel.payload is not None:
            shutil.rmtree(parcel.payload)

    def postpone(self, parcel: Parcel) -> None:
        """Put a parcel, which `first` gave, behind the others."""
        with self._lock:
            self._waiting.remove(parcel.number)
            self._waiting.append(parcel.number)

    def delete(self) -> None:
        """Delete the folder, with what waits in it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _content(self, number: int) -> Path:
        return self._folder / f"{number:08d}.json"

    def _payload(self, number: int) -> Path:
        return self._folder / f"{number:08d}.payload"


def _store(target: Path, payload: Bulk | Path | None) -> None:
    if payload is None:
        return
    shutil.rmtree(target, ignore_errors=True)  # of a process that was killed in the midst of this
    target.mkdir()
    if isinstance(payload, bytes):
        (target / "bytes").write_bytes(payload)
    elif isinstance(payload, np.ndarray):
        np.save(target / "pixels.npy", payload)
    elif payload.is_dir():
        shutil.copytree(payload, target / payload.name)
    else:
        shutil.copyfile(payload, target / payload.name)


def _size(payload: Bulk | Path | None) -> int:
    if payload is None:
        return 0
    if isinstance(payload, bytes):
        return len(payload)
    if isinstance(payload, np.ndarray):
        return int(payload.nbytes)
    files = payload.rglob("*") if payload.is_dir() else [payload]
    return sum(file.stat().st_size for file in files if file.is_file())
