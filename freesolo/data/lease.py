"""Who works on a folder: one process at a time, told by files in the place itself.

    <url>/000001.json   a claim: who holds it, and a count that the holder raises every few seconds
    <url>/000002.json   the next holder's, and so on; the claim with the highest number holds

A claim's file is created only if there is none of that number, so of several that claim at once one gets it, in every
store that can do that. Afterwards only its holder writes to it, and removes it when the work is done. It may be
followed by the next number when its holder is a dead process of this machine, or when its count has stood still for
`TIME_TO_LIVE` seconds on the clock of the one who waits: clocks need not agree.

A holder that finds a later claim, or could not raise its count for most of that time, has lost the lease and stops. It
does so before anyone else may claim, and so no two work on the same folder, also when a network parted them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from freesolo.data.files import (
    UnreadableFileError,
    create_file,
    join,
    list_files,
    read_bytes,
    remove_empty_folder,
    remove_file,
    write_atomic,
)
from freesolo.errors import JobError, UsageError

TIME_TO_LIVE = 120.0
# A holder gives this many signs of life in the time to live,
_BEATS = 12
# and stops this much earlier than anyone may follow it.
_OWN_SHARE = 0.75
_LOOK_SECONDS = 1.0
# Wakes the main thread from whatever it waits for. Not SIGINT: what a shell starts in the background ignores that.
_INTERRUPT = signal.SIGUSR2

_LOG = logging.getLogger(__name__)


class LeaseError(JobError):
    """The folder is another process's to work on."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim's file says.

    Attributes:
        holder: Who, for people: host, process, Ray job.
        since: When it was claimed, UTC, by the holder's clock; for people.
        token: Tells this claim from any other's.
        machine: Where `pid` means something: names the machine's boot and process namespace; None if it has no name.
        pid: The holder's.
        started: When that process started, in seconds since the epoch: numbers of processes are used again.
        beats: How often the holder has given a sign of life.
    """

    holder: str
    since: str
    token: str
    machine: str | None
    pid: int
    started: float
    beats: int = 0

    def to_bytes(self) -> bytes:
        """The claim's file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of_this_process(cls) -> Claim:
        """A new claim."""
        pid = os.getpid()
        job = os.environ.get("RAY_JOB_ID") or os.environ.get("RAY_JOB_SUBMISSION_ID")
        return cls(
            holder=f"process {pid} on {socket.gethostname()}" + (f", Ray job {job}" if job else ""),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=secrets.token_hex(16),
            machine=_this_machine(),
            pid=pid,
            started=psutil.Process(pid).create_time(),
        )

    def is_over(self) -> bool:
        """Whether its holder was a process of this machine and is dead."""
        if self.machine is None or self.machine != _this_machine():
            return False
        try:
            process = psutil.Process(self.pid)
            is_another = bool(abs(process.create_time() - self.started) > 1)
            # Or it was killed, and whoever started it has not looked.
            return is_another or bool(process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


@contextmanager
def held(url: str, *, time_to_live: float = TIME_TO_LIVE) -> Iterator[None]:
    """Hold the lease at `url` for the time of the block.

    A lease that was left by a process elsewhere, which may be alive, is watched until it shows a sign of life, or for
    `time_to_live`. If the lease is lost in the block, the block is interrupted (if it runs in the main thread, and as
    Ctrl-C would) and leaves with a `LeaseError`.

    Args:
        url: A folder of its own.
        time_to_live: Without a sign of life for so many seconds a lease is over; the same for all that use it. Its
            holder gives twelve of them in that time.

    Raises:
        LeaseError: Another process holds it, and is alive; or it was lost in the block. Names the holder.
        UsageError, JobError: The store refuses, or cannot be reached.
    """
    number, claim = _claim(url, time_to_live)
    lease = _Lease(url, number, claim, time_to_live)
    lease.start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as interruption:
        lease.check(interruption)
        raise
    finally:
        lease.stop()
    lease.check(None)


def _claim(url: str, time_to_live: float) -> tuple[int, Claim]:
    """The number of this process's claim, and the claim."""
    own = Claim.of_this_process()
    watched: tuple[int, bytes] | None = None
    watched_since = time.monotonic()
    while True:
        number, data = _latest(url)
        last = _parse(data)
        alone = number == 0 or (last is not None and last.is_over())
        if watched == (number, data) and time.monotonic() - watched_since >= time_to_live:
            _LOG.warning("%s: no sign of life from %s for %g s; taking over", url, _name(last), time_to_live)
            alone = True
        if alone:
            if create_file(_file(url, number + 1), own.to_bytes()) or _latest(url) == (number + 1, own.to_bytes()):
                return number + 1, own
            continue
        if watched is None:
            watched, watched_since = (number, data), time.monotonic()
            _LOG.info("%s: held by %s; looking whether it is alive, for %g s", url, _name(last), time_to_live)
        elif watched != (number, data):
            raise LeaseError(f"{url}: {_name(last)} is at work on this; wait for it, or stop it and run the same again")
        time.sleep(min(_LOOK_SECONDS, time_to_live / 10))


class _Lease:
    """A claim that is kept alive by a thread of its own."""

    def __init__(self, url: str, number: int, claim: Claim, time_to_live: float) -> None:
        self._url = url
        self._number = number
        self._claim = claim
        self._beat_seconds = time_to_live / _BEATS
        self._own_seconds = time_to_live * _OWN_SHARE
        self._over = threading.Event()
        self._ending = threading.Lock()  # held while the lease is lost, or else released: never both
        self._interrupts = threading.current_thread() is threading.main_thread()
        self._handler: Any = None
        self._lost: str | None = None
        self._renewed = time.monotonic()
        # Two threads: one may wait long for a store that does not answer, the other tells when it has been too long.
        self._threads = [
            threading.Thread(target=self._beat, name="lease", daemon=True),
            threading.Thread(target=self._watch, name="lease-watch", daemon=True),
        ]

    def start(self) -> None:
        if self._interrupts:
            self._handler = signal.signal(_INTERRUPT, signal.default_int_handler)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Release it, if it is still held."""
        with self._ending:
            self._over.set()
        if self._interrupts:
            signal.signal(_INTERRUPT, self._handler)
        if self._lost is None:
            self._threads[0].join(self._own_seconds)
        if self._lost is None and not self._threads[0].is_alive():
            try:
                for number in reversed([number for number in _numbers(self._url) if number <= self._number]):
                    remove_file(_file(self._url, number))
                for folder in (self._url, self._url.rpartition("/")[0]):  # if nothing came of the work
                    remove_empty_folder(folder)
            except (UsageError, JobError) as error:
                _LOG.warning("%s: not released (%s); it ends by itself", self._url, error)

    def check(self, interruption: BaseException | None) -> None:
        """Raise if the lease was lost."""
        if self._lost is not None:
            raise LeaseError(f"{self._url}: stopped, because {self._lost}; what was finished is kept") from interruption

    def _beat(self) -> None:
        while not self._over.wait(self._beat_seconds):
            began = time.monotonic()
            try:
                number, data = _latest(self._url)
                if number != self._number:
                    self._lose(f"{_name(_parse(data))} has taken over")
                    return
                self._claim = replace(self._claim, beats=self._claim.beats + 1)
                write_atomic(_file(self._url, self._number), self._claim.to_bytes())
                self._renewed = began
            except (UsageError, JobError) as error:
                _LOG.warning("%s: no sign of life given: %s", self._url, error)

    def _watch(self) -> None:
        while (left := self._renewed + self._own_seconds - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self._lose(f"no sign of life could be given for {self._own_seconds:g} s, and another may take over")

    def _lose(self, reason: str) -> None:
        with self._ending:
            if self._over.is_set():
                return
            self._lost = reason
            self._over.set()
            if self._interrupts:
                signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)


def _latest(url: str) -> tuple[int, bytes]:
    """The number of the last claim, and its file; 0 and nothing where there is none."""
    while numbers := _numbers(url):
        with suppress(UnreadableFileError):  # removed just now
            return numbers[-1], read_bytes(_file(url, numbers[-1]))
    return 0, b""


def _numbers(url: str) -> list[int]:
    """Of all claims, sorted."""
    names = [name.removesuffix(".json") for name in list_files(url)]
    return sorted(int(name) for name in names if name.isdecimal())


def _parse(data: bytes) -> Claim | None:
    """A claim; None where it is not wholly written, or not ours."""
    try:
        return Claim(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _file(url: str, number: int) -> str:
    return join(url, f"{number:06d}.json")


def _name(claim: Claim | None) -> str:
    return "somebody who has not said who" if claim is None else f"{claim.holder} (since {claim.since})"


def _this_machine() -> str | None:
    """Names this boot of this machine and this namespace of processes; None where the system has no such names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
