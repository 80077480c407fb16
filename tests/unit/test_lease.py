"""One process at a time: claims, signs of life, stale and lost leases, on a local disk and on a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from freesolo.data.files import create_file, join, list_files, read_bytes, write_atomic
from freesolo.data.lease import Claim, LeaseError, held
from freesolo.errors import UsageError
from freesolo.stages import StageFolder, StageResult, run_stage
from tests.servers import S3Server

# Holds the lease, tells how that went, and works until its standard input ends or it is interrupted.
HOLDER = """
import sys, time
from freesolo.data.lease import LeaseError, held
url, live = sys.argv[1], float(sys.argv[2])
try:
    with held(url, time_to_live=live):
        print("held", flush=True)
        sys.stdin.read()
    print("released", flush=True)
except LeaseError as error:
    print(f"refused: {error}", flush=True)
"""


def claims(url: str) -> list[dict[str, object]]:
    """What the files say, in order."""
    return [json.loads(read_bytes(join(url, name))) for name in list_files(url)]


def _ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Holder:
    """A process that holds a lease, or was refused it."""

    def __init__(self, url: str, *, live: float = 12.0) -> None:
        command = [sys.executable, "-c", HOLDER, url, str(live)]
        # As in the background of a shell, where Ctrl-C is ignored.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_ignore_ctrl_c
        )

    def says(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def finish(self) -> str:
        """Let it end; its last line."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.says()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    """Killed when the test is over."""
    started: list[Holder] = []
    yield started
    for holder in started:
        holder.process.kill()
        with holder.process:  # closes its pipes, and waits
            pass


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet."""
    return str(tmp_path / "lease") if request.param == "local" else f"{request.getfixturevalue('bucket')}/lease"


def test_of_many_that_create_a_file_at_once_one_does(url: str) -> None:
    wrote = []

    def create(number: int) -> None:
        if create_file(join(url, "file"), str(number).encode()):
            wrote.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrote) == 1
    assert read_bytes(join(url, "file")) == str(wrote[0]).encode()


def test_a_released_lease_is_taken_at_once(url: str) -> None:
    for _ in range(2):
        with held(url):
            (claim,) = claims(url)
            assert claim["pid"] == os.getpid()
        assert claims(url) == []


def test_a_lease_is_released_by_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), held(str(tmp_path)):
        raise ValueError("mine")
    assert claims(str(tmp_path)) == []


def test_of_several_processes_one_holds_and_the_others_name_it(url: str, holders: list[Holder]) -> None:
    holders += [Holder(url) for _ in range(3)]
    said = {holder: holder.says() for holder in holders}
    (winner,) = [holder for holder, line in said.items() if line == "held"]
    for holder in set(holders) - {winner}:
        assert f"process {winner.process.pid} on" in said[holder]
        assert "is at work on this; wait for it, or stop it" in said[holder]
    assert winner.finish() == "released"
    assert claims(url) == []


def test_a_killed_holder_of_this_machine_is_followed_at_once(url: str, holders: list[Holder]) -> None:
    holders.append(Holder(url, live=600))
    assert holders[0].says() == "held"
    holders[0].process.kill()
    holders[0].process.wait()
    started = time.monotonic()
    with held(url, time_to_live=600.0):
        assert time.monotonic() - started < 30
        assert [claim["pid"] for claim in claims(url)] == [holders[0].process.pid, os.getpid()]
    assert claims(url) == []


def test_a_killed_holder_that_nobody_has_looked_for_is_followed_at_once(url: str, holders: list[Holder]) -> None:
    holders.append(Holder(url, live=600))
    assert holders[0].says() == "held"
    holders[0].process.kill()
    os.waitid(os.P_PID, holders[0].process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
    started = time.monotonic()
    with held(url, time_to_live=600.0):
        assert time.monotonic() - started < 30


def test_a_holder_elsewhere_is_watched_for_the_time_to_live(tmp_path: Path) -> None:
    away = Claim("process 1 on elsewhere", "2026-01-01", "token", machine="another", pid=os.getpid(), started=0.0)
    write_atomic(join(str(tmp_path), "000007.json"), away.to_bytes())
    started = time.monotonic()
    with held(str(tmp_path), time_to_live=4.0):
        assert time.monotonic() - started >= 4.0
        assert list_files(str(tmp_path)) == ["000007.json", "000008.json"]
    assert list_files(str(tmp_path)) == []


def test_a_holder_that_has_not_said_who_it_is_is_watched_too(tmp_path: Path) -> None:
    write_atomic(join(str(tmp_path), "000001.json"), b"")
    started = time.monotonic()
    with held(str(tmp_path), time_to_live=4.0):
        assert time.monotonic() - started >= 4.0


def test_who_was_followed_while_it_slept_stops(url: str, holders: list[Holder]) -> None:
    holders.append(Holder(url, live=6.0))
    assert holders[0].says() == "held"
    holders[0].process.send_signal(signal.SIGSTOP)
    with held(url, time_to_live=6.0):
        holders[0].process.send_signal(signal.SIGCONT)
        assert "stopped, because" in holders[0].says()
        assert claims(url)[-1]["pid"] == os.getpid()  # who lost the lease leaves the next one's alone


def test_work_in_the_main_thread_is_interrupted_when_the_lease_is_lost(tmp_path: Path) -> None:
    url = str(tmp_path)

    def work() -> None:
        with held(url, time_to_live=12.0):
            other = Claim("process 1 on elsewhere", "2026", "t", machine=None, pid=1, started=0.0)
            write_atomic(join(url, "000002.json"), other.to_bytes())
            time.sleep(60)

    started = time.monotonic()
    with pytest.raises(LeaseError, match=r"stopped, because process 1 on elsewhere \(since 2026\) has taken over"):
        work()
    assert time.monotonic() - started < 30
    assert claims(url)[1]["token"] == "t"


def test_a_holder_cut_off_from_the_store_stops_before_another_may_follow(s3_server: S3Server, bucket: str) -> None:
    stopped_after: list[float] = []

    def work() -> None:
        with held(f"{bucket}/lease", time_to_live=6.0):
            s3_server.pause()
            cut_off = time.monotonic()
            try:
                time.sleep(60)
            finally:
                stopped_after.append(time.monotonic() - cut_off)
                s3_server.go_on()

    with pytest.raises(LeaseError, match=r"no sign of life could be given for 4\.5 s"):
        work()
    assert stopped_after[0] < 6.0


def test_a_stage_that_another_works_on_is_refused(tmp_path: Path, holders: list[Holder]) -> None:
    folder = StageFolder(str(tmp_path), "run", "solo")
    holders.append(Holder(f"{folder.url}/.lease"))
    assert holders[0].says() == "held"

    def work(_: None) -> StageResult:
        raise AssertionError("two at a time")

    with pytest.raises(LeaseError, match=rf"^{folder.url}/\.lease: process {holders[0].process.pid} on .* is at work"):
        run_stage(folder, {}, lambda: None, work)
    assert not Path(folder.url, "settings.json").exists()


def test_what_the_store_refuses_is_told(bucket: str) -> None:
    with (
        pytest.raises(UsageError, match="no such file or bucket"),
        held("s3://there-is-no-such-bucket/lease"),
    ):
        pass
