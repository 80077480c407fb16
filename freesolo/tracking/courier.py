"""Delivers a run's journal and its spool to someone who may be away, from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from freesolo.tracking.journal import Entry, Journal
from freesolo.tracking.spool import Parcel, Spool

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_SAMPLES = 10.0
ENTRIES_AT_ONCE = 200
REASONS_TOLD = 3


class Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    """The recipient will not take this, however often it is offered."""


@runtime_checkable
class Recipient(AbstractContextManager[object], Protocol):
    """Who is told of a run. All of it is called from the courier's thread, inside the recipient's own context.

    Every call may raise `Refused`, or anything else, which means: not now. What was not taken is offered again, so
    taking a thing twice must be the same as taking it once.
    """

    def open(self) -> None:
        """Get ready for the rest; called until it returns."""

    def take_entries(self, entries: Sequence[Entry]) -> None:
        """Take entries of the journal."""

    def take_parcel(self, parcel: Parcel) -> None:
        """Take a parcel of the spool."""

    def finish(self, status: str) -> None:
        """The run has ended; no more will come."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of a run's records: journal entries and parcels alike.

    Attributes:
        sent: Taken by the recipient.
        undelivered: Not taken.
        reason: Why not, in words for people; None where all is well.
    """

    sent: int
    undelivered: int
    reason: str | None

    def __str__(self) -> str:
        if self.reason is None:
            return f"all {self.sent} records delivered"
        return f"{self.undelivered} of {self.sent + self.undelivered} records not delivered: {self.reason}"


class Courier:
    """One background thread between a run and a recipient.

    Nothing here waits for the recipient but `close`, and that no longer than it is told to.
    """

    def __init__(
        self,
        journal: Journal,
        spool: Spool,
        recipient: Recipient,
        *,
        explain: Callable[[BaseException], str] = str,
        sample: Callable[[], None] | None = None,
        max_pause_seconds: float = 30.0,
    ) -> None:
        """Nothing is delivered before `start`.

        Args:
            journal: Read from its beginning; must stay open until `close` has returned.
            spool: Emptied.
            recipient: Of all of it.
            explain: Puts what the recipient raised in words.
            sample: Called every `SECONDS_BETWEEN_SAMPLES`, in the thread, whether the recipient is there or not.
            max_pause_seconds: Attempts that fail follow one another at pauses that grow to this.
        """
        self._journal = journal
        self._spool = spool
        self._recipient = recipient
        self._explain = explain
        self._sample = sample
        self._max_pause = max_pause_seconds
        self._offset = 0
        self._entries_done = 0
        self._sent = 0
        self._refused = 0
        self._reasons: list[str] = []  # of what is missing for good, each once
        self._trouble: str | None = None  # of the last attempt
        self._opened = False
        self._finished = False
        self._status: str | None = None  # not None: closing
        self._deadline = float("inf")
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="freesolo-courier", daemon=True)

    def start(self) -> None:
        """Begin to deliver. From here on `sample` is called, which may use what its owner made after the courier."""
        self._thread.start()

    def refuse(self, reason: str) -> None:
        """Count a record as undelivered for good, as one that did not even get into the spool."""
        with self._lock:  # the run's thread counts what the spool could not hold, ours what the recipient refused
            self._refused += 1
            if reason not in self._reasons and len(self._reasons) < REASONS_TOLD:
                self._reasons.append(reason)

    def close(self, status: str, timeout: float | int) -> Delivery:
        """Deliver the rest, and say what could not be delivered. Closing again reports again. Only once started.

        Args:
            status: How the run ended, for the recipient.
            timeout: Seconds after which to give up.
        """
        if self._status is None:
            self._deadline = time.monotonic() + timeout
            self._status = status
            self._wake.set()
        # A little more than the deadline: a thread that keeps it is let go of properly.
        self._thread.join(timeout + 0.5)
        waiting = len(self._journal) - self._entries_done + len(self._spool)
        undelivered = waiting + self._refused
        if undelivered == 0 and self._finished:
            return Delivery(self._sent, 0, None)
        reasons = list(self._reasons)
        if waiting or not self._finished:
            reasons.append(self._trouble or f"no answer within {timeout:g} s")
        return Delivery(self._sent, undelivered, "; ".join(reasons))

    def _run(self) -> None:
        next_sample, pause = 0.0, 0.0
        with self._recipient:
            while True:
                if self._sample is not None and time.monotonic() >= next_sample:
                    self._attempt(self._sample)
                    next_sample = time.monotonic() + SECONDS_BETWEEN_SAMPLES
                closing = self._status is not None
                well = self._deliver()
                if closing and (well or self._expired()):
                    return
                pause = 0.0 if well else min(max(2 * pause, 0.25), self._max_pause)
                if self._wake.wait(self._until_next(pause)):
                    self._wake.clear()
                    pause = 0.0

    def _deliver(self) -> bool:
        """Try to bring over all that there is now; whether all of it is done with."""
        closing = self._status is not None
        if not self._opened:
            self._opened = self._attempt(self._recipient.open)
            if not self._opened:
                return False
        well = self._attempt(self._send_entries)
        # Parcels may go to another place (an object store), so that they can fail alone, and metrics alone.
        well = self._attempt(self._send_parcels) and well
        if closing and not self._finished and not self._entries_left():
            self._finished = self._attempt(lambda: self._recipient.finish(str(self._status)))
        if well:
            self._trouble = None
        return well and (self._finished or not closing)

    def _attempt(self, step: Callable[[], None]) -> bool:
        if self._expired():
            return False
        try:
            step()
        except Exception as error:  # noqa: BLE001 - a witness must not bring down what it watches
            self._trouble = self._explain(error)
            return False
        return True

    def _send_entries(self) -> None:
        while not self._expired():
            entries, offset = self._journal.read(self._offset, max_entries=ENTRIES_AT_ONCE)
            if not entries:
                return
            try:
                self._recipient.take_entries(entries)
                self._sent += len(entries)
            except Refused:
                self._send_one_by_one(entries)
            self._offset = offset
            self._entries_done += len(entries)

    def _send_one_by_one(self, entries: Sequence[Entry]) -> None:
        """One bad entry must not take its neighbours with it."""
        reasons = []
        for entry in entries:
            try:
                self._recipient.take_entries([entry])
            except Refused as error:
                reasons.append(self._explain(error))
        # Counted together, at the end: an attempt that fails midway is repeated from its start.
        self._sent += len(entries) - len(reasons)
        for reason in reasons:
            self.refuse(reason)

    def _send_parcels(self) -> None:
        while not self._expired() and (parcel := self._spool.first()) is not None:
            try:
                self._recipient.take_parcel(parcel)
                self._sent += 1
            except Refused as error:
                self.refuse(self._explain(error))
            except BaseException:
                self._spool.postpone(parcel)  # so that one that fails again and again holds up no other
                raise
            self._spool.remove(parcel)

    def _entries_left(self) -> bool:
        return len(self._journal) > self._entries_done

    def _expired(self) -> bool:
        return time.monotonic() > self._deadline

    def _until_next(self, pause: float) -> float:
        left = max(self._deadline - time.monotonic(), 0.0)
        return min(pause or SECONDS_BETWEEN_LOOKS, left)
