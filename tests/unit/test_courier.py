from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from freesolo.tracking.courier import Courier, Delivery, Refused
from freesolo.tracking.journal import Entry, Journal
from freesolo.tracking.spool import Parcel, Spool


class Desk:
    """A recipient that writes down what it takes, and can be away or choosy."""

    def __init__(self) -> None:
        self.away = False
        self.without_store = False  # takes entries, not parcels
        self.without_books = False  # takes parcels, not entries
        self.unwanted_now: set[int] = set()  # parcels that it does not take now
        self.bad_steps: set[int] = set()
        self.opened = 0
        self.steps: list[int] = []
        self.parcels: list[int] = []
        self.status: str | None = None
        self.hang = threading.Event()
        self.hang.set()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def _answer(self) -> None:
        self.hang.wait(60)
        if self.away:
            raise ConnectionError("nobody there")

    def open(self) -> None:
        self._answer()
        self.opened += 1

    def take_entries(self, entries: Sequence[Entry]) -> None:
        self._answer()
        if self.without_books:
            raise OSError("the books are closed")
        if self.bad_steps & {entry.step for entry in entries}:
            raise Refused("a bad name")
        self.steps += [entry.step for entry in entries]

    def take_parcel(self, parcel: Parcel) -> None:
        self._answer()
        if self.without_store or parcel.content["n"] in self.unwanted_now:
            raise OSError("no room in the store")
        if parcel.content["n"] < 0:
            raise Refused("a bad parcel")
        self.parcels.append(parcel.content["n"])

    def finish(self, status: str) -> None:
        self._answer()
        self.status = status


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(str(tmp_path / "run"))
    yield journal
    journal.close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def start(journal: Journal, spool: Spool, desk: Desk, **options: Callable[[], None]) -> Courier:
    courier = Courier(journal, spool, desk, max_pause_seconds=0.25, **options)
    courier.start()
    return courier


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_all_is_delivered_in_order_and_the_end_is_told(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    for step in range(450):  # more than goes at once
        journal.append(step, {"loss": 1.0})
    spool.put({"n": 7})
    courier = start(journal, spool, desk)
    until(lambda: len(desk.steps) == 450 and desk.parcels == [7])
    assert desk.status is None
    journal.append(450, {"loss": 1.0})
    delivery = courier.close("FINISHED", 20)
    assert desk.steps == list(range(451))
    assert (desk.opened, desk.status) == (1, "FINISHED")
    assert delivery == Delivery(sent=452, undelivered=0, reason=None)
    assert str(delivery) == "all 452 records delivered"
    assert courier.close("FINISHED", 20) == delivery


def test_with_nothing_to_send_the_end_is_still_told(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    assert start(journal, spool, desk).close("FAILED", 20) == Delivery(0, 0, None)
    assert desk.status == "FAILED"


def test_what_could_not_be_sent_is_sent_when_the_recipient_is_back(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.away = True
    courier = start(journal, spool, desk)
    journal.append(0, {"loss": 1.0})
    spool.put({"n": 1})
    time.sleep(0.5)
    assert (desk.opened, desk.steps) == (0, [])
    desk.away = False
    until(lambda: desk.steps == [0] and desk.parcels == [1])
    desk.away = True  # and goes again, once open
    journal.append(1, {"loss": 1.0})
    time.sleep(0.5)
    desk.away = False
    assert courier.close("FINISHED", 20) == Delivery(3, 0, None)
    assert desk.steps == [0, 1]


def test_a_recipient_that_never_comes_is_given_up_on_in_time(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.away = True
    courier = start(journal, spool, desk)
    journal.append(0, {"loss": 1.0})
    spool.put({"n": 1})
    began = time.monotonic()
    delivery = courier.close("FINISHED", 1.0)
    assert time.monotonic() - began < 2.0
    assert delivery == Delivery(0, 2, "nobody there")
    assert str(delivery) == "2 of 2 records not delivered: nobody there"
    assert len(spool) == 1


def test_a_recipient_that_hangs_does_not_hold_up_the_run_or_its_end(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.hang.clear()
    courier = start(journal, spool, desk)
    began = time.monotonic()
    for step in range(100):
        journal.append(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    delivery = courier.close("FINISHED", 0.5)
    assert time.monotonic() - began < 3.0
    assert delivery == Delivery(0, 100, "no answer within 0.5 s")
    desk.hang.set()


def test_a_store_that_fails_holds_up_no_metrics_and_one_parcel_no_other(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.without_store = True
    for n in (1, 2):
        spool.put({"n": n})
    courier = start(journal, spool, desk)
    journal.append(0, {"loss": 1.0})
    until(lambda: desk.steps == [0])
    desk.without_store = False
    until(lambda: sorted(desk.parcels) == [1, 2])
    desk.without_store = True
    spool.put({"n": 3})
    assert courier.close("FINISHED", 1.0) == Delivery(3, 1, "no room in the store")
    assert desk.status == "FINISHED"


def test_a_parcel_that_fails_again_and_again_holds_up_no_other(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.unwanted_now = {1}
    for n in (1, 2, 3):
        spool.put({"n": n})
    courier = start(journal, spool, desk)
    until(lambda: desk.parcels == [2, 3])
    assert courier.close("FINISHED", 0.5) == Delivery(2, 1, "no room in the store")


def test_entries_that_fail_hold_up_no_parcel_and_the_end_is_told_after_them(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.without_books = True
    journal.append(0, {"loss": 1.0})
    spool.put({"n": 1})
    courier = start(journal, spool, desk)
    until(lambda: desk.parcels == [1])
    assert courier.close("FINISHED", 0.5) == Delivery(1, 1, "the books are closed")
    assert desk.status is None


def test_trouble_that_has_passed_is_not_the_reason_for_a_later_one(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.away = True
    courier = start(journal, spool, desk)
    journal.append(0, {"loss": 1.0})
    time.sleep(0.3)
    desk.away = False
    until(lambda: desk.steps == [0])
    time.sleep(0.3)  # until it has been written down that all is well
    desk.hang.clear()
    journal.append(1, {"loss": 1.0})
    assert courier.close("FINISHED", 0.5) == Delivery(1, 1, "no answer within 0.5 s")
    desk.hang.set()


def test_what_is_refused_is_reported_and_takes_nothing_with_it(journal: Journal, spool: Spool) -> None:
    desk = Desk()
    desk.bad_steps = {3}
    for step in range(6):
        journal.append(step, {"loss": 1.0})
    for n in (1, -1, 2):
        spool.put({"n": n})
    courier = start(journal, spool, desk)
    courier.refuse("too large to keep")
    delivery = courier.close("FINISHED", 20)
    assert desk.steps == [0, 1, 2, 4, 5]
    assert desk.parcels == [1, 2]
    assert (delivery.sent, delivery.undelivered) == (7, 3)
    assert delivery.reason is not None
    assert sorted(delivery.reason.split("; ")) == ["a bad name", "a bad parcel", "too large to keep"]


def test_nothing_is_sampled_before_the_start(journal: Journal, spool: Spool) -> None:
    """A witness samples into itself: its first sample was lost where the thread was faster than the constructor."""
    samples: list[int] = []
    courier = Courier(journal, spool, Desk(), sample=lambda: samples.append(1))
    time.sleep(0.05)
    assert samples == []
    courier.start()
    until(lambda: samples == [1])
    assert courier.close("FINISHED", 20).reason is None


def test_samples_are_taken_whether_the_recipient_is_there_or_not(
    journal: Journal, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freesolo.tracking.courier.SECONDS_BETWEEN_SAMPLES", 0.1)
    desk = Desk()
    desk.away = True
    samples: list[int] = []

    def sample() -> None:
        samples.append(1)
        if len(samples) == 2:
            raise OSError("no such sensor")

    courier = start(journal, spool, desk, sample=sample)
    until(lambda: len(samples) >= 4)
    desk.away = False
    assert courier.close("FINISHED", 20).reason is None
