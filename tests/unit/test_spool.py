from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from freesolo.tracking.spool import Spool


def numbers(spool: Spool) -> list[int]:
    """The parcels' contents, in the order of their turns; empties the spool."""
    taken = []
    while (parcel := spool.first()) is not None:
        taken.append(parcel.content["n"])
        spool.remove(parcel)
    return taken


def test_an_empty_spool_has_no_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert len(spool) == 0
    assert spool.first() is None


def test_parcels_come_in_the_order_in_which_they_were_put(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(12):
        assert spool.put({"n": n})
    assert len(spool) == 12
    assert numbers(spool) == list(range(12))
    assert list(tmp_path.iterdir()) == []


def test_a_postponed_parcel_goes_behind_the_others(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.put({"n": n})
    first = spool.first()
    assert first is not None
    spool.postpone(first)
    spool.put({"n": 3})
    assert numbers(spool) == [1, 2, 0, 3]


def test_payloads_are_kept_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("hello")
    spool = Spool(tmp_path / "spool")
    spool.put({"n": 0}, b"bytes")
    spool.put({"n": 1}, np.full((2, 3, 3), 7, np.uint8))
    spool.put({"n": 2}, tmp_path / "page" / "index.html")
    spool.put({"n": 3}, tmp_path / "page")
    (tmp_path / "page" / "index.html").write_text("changed afterwards")

    contents = []
    for _ in range(4):
        parcel = spool.first()
        assert parcel is not None
        assert parcel.payload is not None
        contents.append({str(file.relative_to(parcel.payload)): file for file in parcel.payload.rglob("*.*")} or None)
        if parcel.content["n"] == 0:
            assert (parcel.payload / "bytes").read_bytes() == b"bytes"
        if parcel.content["n"] == 1:
            assert np.load(parcel.payload / "pixels.npy").tolist() == np.full((2, 3, 3), 7).tolist()
        if parcel.content["n"] == 2:
            assert (parcel.payload / "index.html").read_text() == "hello"
        if parcel.content["n"] == 3:
            assert (parcel.payload / "page" / "index.html").read_text() == "hello"
        spool.remove(parcel)
        assert not parcel.payload.exists()


def test_what_a_killed_process_left_is_continued(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for n in range(3):
        spool.put({"n": n}, b"x" * 10)
    first = spool.first()
    assert first is not None
    spool.remove(first)
    # Killed in the midst of a put: a payload without content, and content that was not renamed yet.
    (tmp_path / "00000003.payload").mkdir()
    (tmp_path / "00000003.payload" / "bytes").write_bytes(b"half")
    (tmp_path / "00000003.part").write_text('{"n": ')

    continued = Spool(tmp_path, max_bytes=25)
    assert len(continued) == 2
    assert not continued.put({"n": 9}, b"x" * 6)  # 20 bytes of payloads wait already
    assert continued.put({"n": 3}, b"x" * 5)
    assert numbers(continued) == [1, 2, 3]


@pytest.mark.parametrize(("max_parcels", "max_bytes", "taken"), [(2, 1000, 2), (10, 30, 3), (10, 9, 0)])
def test_a_full_spool_takes_no_more(tmp_path: Path, max_parcels: int, max_bytes: int, taken: int) -> None:
    spool = Spool(tmp_path, max_parcels=max_parcels, max_bytes=max_bytes)
    answers = [spool.put({"n": n}, b"x" * 10) for n in range(5)]
    assert answers == [True] * taken + [False] * (5 - taken)
    assert numbers(spool) == list(range(taken))
    assert spool.put({"n": 5}, b"x" * 9)  # emptied, there is room again


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.put({"n": 0}, b"x")
    spool.delete()
    assert not (tmp_path / "spool").exists()
