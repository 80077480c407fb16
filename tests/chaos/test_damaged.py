"""Data that is damaged: counted and named, and a job stops where there is more of it than it allows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from freesolo.data.documents import canonical_digest
from freesolo.data.labels import read_label_manifest
from freesolo.data.shards import read_dataset_manifest, read_shard, write_dataset_manifest, write_shard
from freesolo.models.download import sha256_of_file
from freesolo.tracking.journal import read_journal
from tests.chaos.jobs import SHARDS, Ended, Place, Run
from tests.chaos.record import FOLDER, Row, record
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(900),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]
ROWS = Path(__file__).stem
SCENES, STEPS = 96, 12  # one photo is a percent, and the steps one epoch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    (FOLDER / f"{ROWS}.jsonl").unlink(missing_ok=True)
    place = Place(str(tmp_path_factory.mktemp("place")), scenes=SCENES, steps=STEPS)
    place.make_photos()
    return place


@pytest.fixture(scope="module")
def before(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Jobs on whole data."""
    return place.undisturbed(("pack", "pretrain", "extract"), tmp_path_factory.mktemp("configs"))


def one_bad_photo(root: Path) -> str:
    """Half of a photo's bytes are lost before it is packed; nobody looked. Its key."""
    manifest = read_dataset_manifest(str(root / "data"))
    shard = manifest.shards[1]
    samples = list(read_shard(str(root / "data"), shard))
    bad = samples[3]
    samples[3] = replace(bad, image_bytes=bad.image_bytes[: len(bad.image_bytes) // 2])
    rewritten = write_shard(str(root / "data"), shard.name, samples)
    shards = (manifest.shards[0], rewritten, *manifest.shards[2:])
    write_dataset_manifest(str(root / "data"), replace(manifest, shards=shards))
    return bad.key


def cut_tar(root: Path) -> str:
    """A shard ends in the middle of a photo."""
    path = root / "data" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "shard-000001"


def label_of_an_unknown_image(root: Path) -> str:
    """A label file is another shard's, and the manifest says that it is right."""
    labels = root / "masks-undisturbed"
    shutil.copy(labels / "shard-000002.parquet", labels / "shard-000001.parquet")
    manifest = read_label_manifest(str(labels))
    other = replace(manifest.files[2], name="shard-000001")
    (labels / "manifest.json").write_text(
        replace(manifest, files=(manifest.files[0], other, *manifest.files[2:])).to_json()
    )
    return f"labels of {SCENES // SHARDS} unknown images"


@dataclass(frozen=True, slots=True)
class Damage:
    """What is damaged, and what is allowed.

    Attributes:
        name: In the table.
        job: On it.
        make: Does it, and tells what a job must name.
        bad: Share of samples that are lost.
    """

    name: str
    job: str
    make: Callable[[Path], str]
    bad: float


DAMAGES = [
    *(Damage("1% bad JPEGs", job, one_bad_photo, 1 / SCENES) for job in ("pretrain", "extract", "train")),
    *(Damage("a truncated tar", job, cut_tar, 1 / SHARDS) for job in ("pretrain", "train")),
    Damage("labels of unknown images", "train", label_of_an_unknown_image, 1 / SHARDS),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: f"{damage.job}: {damage.name}")
def test_what_is_damaged_is_counted_and_named(
    damage: Damage, place: Place, before: dict[str, Run], tmp_path: Path
) -> None:
    """Within the budget the job ends, and says how many; above it the job stops, and says which."""
    shutil.copytree(place.root, tmp_path / "damaged")
    damaged = Place(str(tmp_path / "damaged"), scenes=SCENES, steps=STEPS)
    named = damage.make(tmp_path / "damaged")

    def run(name: str, allowed: float) -> Ended:
        budget = {"extract": "extract.max_bad_samples", "pretrain": "pretrain.stream.max_bad_samples"}
        key = budget.get(damage.job, "train.stream.max_bad_samples")
        labels = [f"labels={damaged.root}/masks-undisturbed", "train.supervision=free_masks"]
        labels.append("train.model.embedding_channels=4")
        extra = labels if damage.make is label_of_an_unknown_image else []
        return damaged.run(damage.job, name, before, tmp_path, f"{key}={allowed}", *extra)

    allowing = run("allowing", damage.bad + 0.001)
    assert allowing.code == 0, allowing.errors[-3000:]
    refusing = run("refusing", damage.bad / 5)
    count = counted(damaged, damage.job, allowing)
    said = re.sub(r"/\S*/", "", refusing.error)
    outcome = f"goes on; with fewer allowed: exit code {refusing.code}: {said}"
    record(ROWS, Row(damage.name, damage.job, outcome, count, "", refusing.seconds, 1))
    assert refusing.code == 1
    assert named in refusing.error
    assert re.search(r"more than the \S+ that (\w+\.)*max_bad_samples=\S+ allows; first: ", refusing.error)
    assert "Traceback" not in refusing.errors


def counted(place: Place, job: str, ended: Ended) -> int:
    """How many bad samples a job that went on counted."""
    if job == "extract":
        count = ended.result["counts"]["unreadable"]
    else:
        journal = read_journal(f"{place.root}/runs/allowing/{job}")
        count = int(max(entry.metrics.get("bad_samples", 0) for entry in journal))
    assert count > 0
    return count


def poison(checkpoint: Path) -> None:
    """A weight becomes NaN, with checksums that say that this was what was saved."""
    state = torch.load(checkpoint / "learner.pt", weights_only=True)
    next(iter(state["module"].values())).view(-1)[0] = float("nan")
    torch.save(state, checkpoint / "learner.pt")
    written: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text())
    del written["digest"]
    written["sha256"] = {"learner.pt": sha256_of_file(checkpoint / "learner.pt")}
    (checkpoint / "progress.json").write_text(json.dumps(written | {"digest": canonical_digest(written)}))


def train_workers() -> list[int]:
    """Of this process's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def poison_and_kill(checkpoints: Path, done: list[int]) -> None:
    """When there are two checkpoints to go on from, spoil the newer one and SIGKILL a train worker."""
    snapshot = checkpoints / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        committed = sorted(set(re.findall(r"step-\d{8}", snapshot.read_text()))) if snapshot.exists() else []
        workers = train_workers()
        if len(committed) > 1 and workers:
            poison(checkpoints / committed[-1])
            os.kill(workers[0], signal.SIGKILL)
            done.append(int(committed[-1].removeprefix("step-")))
            return
        time.sleep(0.02)


def test_a_checkpoint_with_nan_in_it_is_passed_over(place: Place, before: dict[str, Run], tmp_path: Path) -> None:
    done: list[int] = []
    killer = threading.Thread(
        target=poison_and_kill, args=(Path(place.root, "runs", "poisoned", "pretrain", "checkpoints"), done)
    )
    killer.start()
    ended = place.run("pretrain", "poisoned", before, tmp_path)
    killer.join()
    assert done, "nothing was poisoned: the run was over too soon"
    made = place.made_by("pretrain", "poisoned", ended)
    lost = made.lost(before["pretrain"])
    record(ROWS, Row("NaN in a checkpoint", "pretrain", "the one before it; same result", lost, "", ended.seconds, 1))
    assert made.used == before["pretrain"].used
    assert made.made == before["pretrain"].made
