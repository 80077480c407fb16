"""A disk without room, and shared memory without room: one clear error, and once there is room the same result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from freesolo.data.labels import read_label_manifest
from tests.chaos.cluster import ROOT, wait_for
from tests.chaos.disks import SmallDisk, can_mount, small_disk
from tests.chaos.jobs import Ended, Place, Run
from tests.chaos.record import FOLDER, Row, record
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN
from tests.servers import RayHead

with tempfile.TemporaryDirectory() as trial:
    CAN_MOUNT = can_mount(Path(trial))
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CAN_MOUNT, reason="a small disk is mounted: needs root"),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]
ROWS = Path(__file__).stem


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    (FOLDER / f"{ROWS}.jsonl").unlink(missing_ok=True)
    with small_disk(tmp_path_factory.mktemp("disk"), megabytes=2000) as disk:
        yield disk


@pytest.fixture(scope="module")
def place(disk: SmallDisk) -> Place:
    place = Place(str(disk.path))
    place.make_photos()
    return place


@pytest.fixture(scope="module")
def before(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Jobs that had room."""
    return place.undisturbed(("pack", "pretrain", "extract"), tmp_path_factory.mktemp("configs"))


# Bytes that are left: something is written, and then there is no room for a shard, a checkpoint, a label file.
LEFT = {"pack": 30_000, "pretrain": 40 * 2**20, "extract": 20_000}


@pytest.mark.parametrize("job", LEFT)
def test_a_full_disk_is_told_and_a_run_goes_on_when_there_is_room(
    job: str, disk: SmallDisk, place: Place, before: dict[str, Run], tmp_path: Path
) -> None:
    expected = before[job]
    disk.fill(leave=LEFT[job])
    try:
        full = place.run(job, "full", before, tmp_path)
    finally:
        disk.make_room()
    assert full.code == 1, full.errors[-3000:]
    made = place.made_by(job, "full", place.run(job, "full", before, tmp_path))
    said = re.sub(rf"{disk.path}/\S*/", "", full.error)
    record(ROWS, Row("disk full", job, f"exit code 1: {said}", made.lost(expected), "", full.seconds, 1))
    assert re.search(r"^error: .*: the disk is full \(.*No space left on device\); make room", full.error)
    assert "Traceback" not in full.error
    assert made.used == expected.used
    assert made.made == expected.made


HOG = """
import sys, time
import numpy as np, ray
ray.init(address=sys.argv[1])
held = []
try:
    while True:
        held.append(ray.put(np.zeros(4 * 2**20, np.uint8)))
except ray.exceptions.RayError as error:
    print("full", len(held), type(error).__name__, flush=True)
time.sleep(10_000)
"""


@pytest.fixture
def head() -> Iterator[RayHead]:
    """A node whose shared memory, and the disk that it spills to, hold little."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "spilled").mkdir()
        with small_disk(folder / "spilled", megabytes=100):
            options = (f"--object-store-memory={100 * 2**20}", f"--object-spilling-directory={folder / 'spilled'}")
            server = RayHead(folder, num_cpus=4, options=options)
            try:
                server.start()
                yield server
            finally:
                server.kill()


@pytest.mark.parametrize(("job", "script"), [("pretrain", "pretrain_densecl"), ("extract", "extract_free_masks")])
def test_full_shared_memory_is_told_and_a_run_goes_on_when_there_is_room(
    job: str, script: str, head: RayHead, place: Place, before: dict[str, Run], tmp_path: Path
) -> None:
    settings = place.config(job, "memory", before)
    if job == "pretrain":
        settings["pretrain"]["views"] = {"size": 160}  # smaller blocks go from task to task without shared memory
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    environment = {**os.environ, **head.settings(), "RAY_ADDRESS": head.address, "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}

    def run(name: str) -> Ended:
        command = [sys.executable, f"jobs/{script}.py", "--config", str(config), "--run-name", name]
        command += ["--storage", f"{place.root}/runs", *([] if job == "pretrain" else [f"labels={place.root}/{name}"])]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        return Ended(done.returncode, result, errors[-1] if errors else "", done.stderr, time.monotonic() - began)

    log = tmp_path / "hog.log"
    with log.open("w") as stream:
        hog = subprocess.Popen([sys.executable, "-c", HOG, head.address], env=environment, stdout=stream, stderr=stream)
    try:
        wait_for(lambda: "full" in log.read_text(), what="shared memory to be full")
        full = run("hungry")
    finally:
        hog.kill()
        hog.wait()
    again, calm = run("hungry"), run("calm")
    assert again.code == calm.code == 0, again.errors[-4000:]
    said = re.sub(rf"{place.root}/\S*/", "", full.error)
    record(ROWS, Row("shared memory full", job, f"exit code {full.code}: {said}", None, "", full.seconds, 1))
    assert full.code == 1, full.errors[-4000:]
    assert re.search(r"^error: .*(shared memory is full|Local disk is full|object store is full)", full.error)
    if job == "extract":
        assert read_label_manifest(f"{place.root}/hungry").digest == read_label_manifest(f"{place.root}/calm").digest
    else:
        models = [Path(place.root, "runs", name, "pretrain", "model.pt").read_bytes() for name in ("hungry", "calm")]
        assert models[0] == models[1]
