"""The whole pipeline on three hosts, over S3, with MLflow on PostgreSQL, while hosts lose power and links are cut."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from freesolo.data.files import exists, join, list_files, read_bytes
from freesolo.data.labels import read_label_manifest
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from tests.chaos.cluster import Cluster, cluster, finish, wait_for
from tests.chaos.hosts import can_make_hosts
from tests.chaos.record import Row, record
from tests.chaos.timeline import Timeline
from tests.servers import PostgresServer

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_hosts(), reason="hosts are network namespaces: needs root and iproute2"),
    pytest.mark.skipif(not PostgresServer.installed(), reason="needs Debian's postgresql, and root"),
]
STEPS = 40
EVERY = 5  # steps between checkpoints
SMALL = (
    'resources={"workers": 2, "label_selector": {"freesolo.dev/pool": "train"}}',
    *(f"pretrain.loop.steps={STEPS}", f"pretrain.loop.checkpoint_every={EVERY}", "pretrain.loop.record_samples=true"),
    *(f"train.loop.steps={STEPS}", f"train.loop.checkpoint_every={EVERY}", "train.loop.record_samples=true"),
)
LABEL_SETS = ("free-masks", "pseudo-labels-r1", "held-out-free-masks", "held-out-solo-r0", "held-out-solo-r1")


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[Cluster]:
    """A head and two workers."""
    with cluster() as made:
        made.join("one")
        made.join("two")
        yield made


@pytest.fixture
def reach(three_hosts: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The same, with the environment of a person who may use its store and its MLflow."""
    for name, value in three_hosts.environment.items():
        monkeypatch.setenv(name, value)
    return three_hosts


def submit_pipeline(hosts: Cluster, bucket: str) -> subprocess.Popen[str]:
    """The smoke pipeline, on two train workers."""
    return hosts.submit(
        *("jobs/run_pipeline.py", "--config", "configs/pipeline/smoke.yaml", "--run-name", "r"),
        *("--storage", f"{bucket}/runs", f"dataset={bucket}/data/train", f"evaluation_dataset={bucket}/data/held-out"),
        *SMALL,
    )


def make_data(bucket: str) -> None:
    """Scenes to train on in 8 shards, and annotated ones."""
    for name, scenes, seed in (("train", 32, 0), ("held-out", 8, 1)):
        annotations = compose_scenes(f"{bucket}/photos/{name}", scenes, size=96, seed=seed)
        pack(annotations, f"{bucket}/data/{name}", samples_per_shard=4)


def label_files(run: str) -> dict[str, dict[str, str]]:
    """The checksums of each label set's files, and its number of images."""
    found: dict[str, dict[str, str]] = {}
    for stage in LABEL_SETS:
        manifest = read_label_manifest(f"{run}/{stage}/labels")
        found[stage] = {file.name: file.sha256 for file in manifest.files} | {"images": str(manifest.images)}
    return found


def samples_of_steps(stage: str) -> dict[int, list[int]]:
    """The image ids that each step of a training used; a step that was done again counts once, as it was used last."""
    used: dict[int, dict[str, list[int]]] = {}
    for name in list_files(join(stage, "samples")):
        worker = name.rpartition("-worker-")[2]
        for step, image_ids in json.loads(read_bytes(join(stage, "samples", name))):
            used.setdefault(step, {})[worker] = image_ids
    return {step: sorted(image for part in parts.values() for image in part) for step, parts in used.items()}


def committed(stage: str) -> int:
    """Checkpoints that a training may go on from."""
    snapshot = join(stage, "checkpoints", "checkpoint_manager_snapshot.json")
    return read_bytes(snapshot).count(b"checkpoint_dir_name") if exists(snapshot) else 0


def labelled(stage: str) -> int:
    """Label files that are finished."""
    return sum(name.endswith(".parquet") for name in list_files(join(stage, "labels")))


def test_a_pipeline_loses_a_host_in_each_stage_and_ends_as_if_it_had_not(reach: Cluster) -> None:
    hosts = reach
    calm, storm = hosts.bucket("calm"), hosts.bucket("storm")
    make_data(calm)
    make_data(storm)
    undisturbed = finish(submit_pipeline(hosts, calm))

    run, timeline = f"{storm}/runs/r", Timeline("One pipeline, three hosts, a host lost in each stage")
    job = submit_pipeline(hosts, storm)
    for stage, process, under_way in (
        ("pretrain", "RayTrainWorker", committed),
        ("free-masks", "MapWorker(MapBatches(_LabellingActor", labelled),
        ("solo-r0", "RayTrainWorker", committed),
        ("pseudo-labels-r1", "MapWorker(MapBatches(_LabellingActor", labelled),
        ("solo-r1", "RayTrainWorker", committed),
    ):
        url = join(run, stage)
        wait_for(lambda url=url: exists(join(url, "settings.json")), what=f"{stage} to begin")
        timeline.begin(stage)
        wait_for(lambda act=under_way, url=url: act(url) >= 1, what=f"{stage} to get somewhere")
        wait_for(lambda name=process: hosts.host_of(name), what=f"a host of {process}")
        lost = hosts.host_of(process)
        assert lost is not None
        done_before = under_way(url)
        hosts.lose(lost)
        killed = timeline.mark(f"{lost} lost")
        assert not exists(join(url, "result.json")), f"{stage} was over before its host was lost"
        hosts.join(lost)
        timeline.mark(f"{lost} joins")
        wait_for(lambda act=under_way, url=url, n=done_before: act(url) > n, what=f"{stage} to go on", seconds=400)
        recovered = timeline.mark(f"{stage} goes on")
        wait_for(lambda url=url: exists(join(url, "result.json")), what=f"{stage} to end", seconds=400)
        timeline.end(stage)
        record(
            "hosts",
            Row(
                fault="host SIGKILLed, another joins",
                job=stage,
                outcome="same result",
                lost=0,
                twice="",
                seconds=recovered - killed,
                hits=1,
            ),
        )
    disturbed = finish(job)
    timeline.draw(Path("build/chaos/pipeline.png"))

    assert label_files(f"{storm}/runs/r") == label_files(f"{calm}/runs/r")
    for stage in ("pretrain", "solo-r0", "solo-r1"):
        used = samples_of_steps(f"{storm}/runs/r/{stage}")
        assert used == samples_of_steps(f"{calm}/runs/r/{stage}")
        assert sorted(used) == list(range(STEPS))
    assert disturbed["metrics"] == undisturbed["metrics"]
    outputs: Any = disturbed["outputs"]
    assert outputs["SOLO round 1"].startswith("models:/freesolo-smoke/")
    versions = MlflowClient(hosts.mlflow.url).search_model_versions("name='freesolo-smoke'")
    assert {version.version for version in versions} >= {"1", "2", "3", "4"}


def test_elastic_training_goes_on_with_fewer_hosts_and_with_more(reach: Cluster) -> None:
    hosts = reach
    bucket = hosts.bucket("elastic")
    make_data(bucket)
    stage, steps = f"{bucket}/runs/e/solo", 400
    job = hosts.submit(
        *("jobs/train_solo.py", "--config", "configs/train/smoke.yaml", "--run-name", "e"),
        *("--storage", f"{bucket}/runs", f"dataset={bucket}/data/train", f"train.loop.steps={steps}"),
        *('resources={"workers": [1, 2], "cpus_per_worker": 2, "resize_seconds": 5}', "train.loop.record_samples=true"),
    )
    wait_for(lambda: committed(stage) >= 2, what="checkpoints of two workers")
    lost = hosts.host_of("RayTrainWorker")
    assert lost is not None
    hosts.lose(lost)
    killed = time.monotonic()
    before = committed(stage)
    wait_for(lambda: committed(stage) > before, what="training to go on with one worker", seconds=400)
    gone_on = time.monotonic() - killed
    hosts.join(lost)
    finish(job)
    record("hosts", Row("host SIGKILLed, elastic", "solo", "each sample once", 0, "", gone_on, 1))
