"""The whole pipeline on three hosts, over S3, with MLflow on PostgreSQL, while hosts lose power and links are cut."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from s3fs import S3FileSystem

from freesolo.data.files import exists, join, list_files, read_bytes
from freesolo.data.labels import read_label_manifest
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.models.weights import read_state_dict
from tests.chaos.cluster import NOTICE_SECONDS, ROOT, WORKER, Cluster, Submission, cluster, steps_done_again, wait_for
from tests.chaos.hosts import can_make_hosts
from tests.chaos.record import FOLDER, Row, record
from tests.chaos.timeline import Timeline
from tests.servers import PostgresServer

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_hosts(), reason="hosts are network namespaces: needs root and iproute2"),
    pytest.mark.skipif(not PostgresServer.installed(), reason="needs Debian's postgresql, and root"),
]
STEPS = 24
EVERY = 4  # steps between checkpoints
SMALL = (
    'resources={"workers": 2, "label_selector": {"freesolo.dev/pool": "train"}, "data_cpus": 2}',
    *(f"pretrain.loop.steps={STEPS}", f"pretrain.loop.checkpoint_every={EVERY}", "pretrain.loop.record_samples=true"),
    *(f"train.loop.steps={STEPS}", f"train.loop.checkpoint_every={EVERY}", "train.loop.record_samples=true"),
    # So few steps make no segmenter; at a low rate it stays near its beginning, and whatever it finds is labelled.
    *("train.optimizer.learning_rate=0.0001", "predict.max_width=1.0"),
)
TRAININGS = ("pretrain", "solo-r0", "solo-r1")
PICTURE = FOLDER / "pipeline.png"


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
    use(three_hosts, monkeypatch)
    for name in ("one", "two"):  # a test that failed may have left one without its node
        if name not in three_hosts.workers or not three_hosts.workers[name].alive:
            if name in three_hosts.workers:
                three_hosts.lose(name)
            three_hosts.join(name)
    return three_hosts


def submit_pipeline(hosts: Cluster, bucket: str) -> Submission:
    """The smoke pipeline, on two train workers."""
    return hosts.submit(
        *("jobs/run_pipeline.py", "--config", "configs/pipeline/smoke.yaml", "--run-name", "r"),
        *("--storage", f"{bucket}/runs", f"dataset={bucket}/data/train", f"evaluation_dataset={bucket}/data/held-out"),
        *SMALL,
    )


def make_data(bucket: str) -> None:
    """Scenes to train on in 16 shards, and annotated ones."""
    for name, scenes, seed in (("train", 64, 0), ("held-out", 8, 1)):
        annotations = compose_scenes(f"{bucket}/photos/{name}", scenes, size=96, seed=seed)
        pack(annotations, f"{bucket}/data/{name}", samples_per_shard=4)


@dataclass(frozen=True)
class Calm:
    """A pipeline that nothing disturbed.

    Attributes:
        bucket: Of its data.
        run: Its folder.
        result: What the job said last.
    """

    bucket: str
    run: str
    result: dict[str, Any]


@pytest.fixture(scope="module")
def calm(three_hosts: Cluster) -> Calm:
    with pytest.MonkeyPatch.context() as environment:
        use(three_hosts, environment)
        bucket = three_hosts.bucket("calm")
        make_data(bucket)
        return Calm(bucket, f"{bucket}/runs/r", submit_pipeline(three_hosts, bucket).finishes())


def use(hosts: Cluster, environment: pytest.MonkeyPatch) -> None:
    """Be a person who may use the hosts' store and MLflow."""
    for name, value in hosts.environment.items():
        environment.setenv(name, value)
    S3FileSystem.clear_instance_cache()


def label_files(labels: str) -> dict[str, str]:
    """The checksums of a label set's files."""
    return {file.name: file.sha256 for file in read_label_manifest(labels).files}


def samples_of_steps(stage: str) -> dict[int, list[int]]:
    """The image ids that each step of a training used, as it was done last, all workers together."""
    used: dict[int, list[int]] = {}
    for name in list_files(join(stage, "samples")):
        for step, image_ids in json.loads(read_bytes(join(stage, "samples", name))):
            used.setdefault(step, []).extend(image_ids)
    return used


def lost_samples(stage: str, undisturbed: str) -> int:
    """How many samples a training did not use in the step in which it should have."""
    used, expected = samples_of_steps(stage), samples_of_steps(undisturbed)
    return sum((Counter(expected[step]) - Counter(used.get(step, ()))).total() for step in expected)


def lost_files(labels: str, undisturbed: str) -> int:
    """How many files of a label set are not there as they should be."""
    return len(label_files(undisturbed).items() - label_files(labels).items())


def same_training(stage: str, undisturbed: str) -> bool:
    """Whether a training used the same samples in each step, and ends with the same weights, bit for bit."""
    used, expected = samples_of_steps(stage), samples_of_steps(undisturbed)
    assert sorted(expected) == list(range(STEPS))
    with tempfile.TemporaryDirectory() as folder:
        states = []
        for number, url in enumerate((stage, undisturbed)):
            path = Path(folder) / f"{number}.pt"
            path.write_bytes(read_bytes(join(url, "model.pt")))
            states.append(read_state_dict(path))
    ours, theirs = states
    return used == expected and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def told(same: bool) -> str:
    """An outcome, in README's table."""
    return "same result" if same else "another result"


def committed(stage: str) -> int:
    """The last step that a training can go on from."""
    snapshot = join(stage, "checkpoints", "checkpoint_manager_snapshot.json")
    steps = re.findall(rb"step-(\d+)", read_bytes(snapshot)) if exists(snapshot) else []
    return max(map(int, steps), default=0)


def labelled(stage: str) -> int:
    """Label files that are finished."""
    return sum(name.endswith(".parquet") for name in list_files(join(stage, "labels")))


def done(stage: str) -> bool:
    """Whether a stage is over."""
    return exists(join(stage, "result.json"))


def further(progress: Callable[[str], int], stage: str, before: int) -> bool:
    """Whether a stage has got further than it was."""
    return progress(stage) > before or done(stage)


TRAIN_WORKER, ACTOR = r"ray::RayTrainWorker", r"ray::MapWorker\(MapBatches\(_LabellingActor"
DATA_WORKER = r"ray::(ReadShards|MapBatches)"


def test_a_pipeline_loses_a_host_in_each_stage_and_ends_as_if_it_had_not(reach: Cluster, calm: Calm) -> None:
    hosts = reach
    storm = hosts.bucket("storm")
    make_data(storm)
    run, timeline = f"{storm}/runs/r", Timeline("One pipeline, three hosts, a host lost in each stage")
    job = submit_pipeline(hosts, storm)
    recovery: dict[str, float] = {}
    for stage, process, progress in (
        ("pretrain", TRAIN_WORKER, committed),
        ("free-masks", ACTOR, labelled),
        ("solo-r0", TRAIN_WORKER, committed),
        ("pseudo-labels-r1", ACTOR, labelled),
        ("solo-r1", TRAIN_WORKER, committed),
    ):
        url = join(run, stage)
        job.until(partial(exists, join(url, "settings.json")), what=f"{stage} to begin")
        timeline.begin(stage)
        job.until(partial(progress, url), what=f"{stage} to get somewhere")
        lost, _ = hosts.catch(process)
        before = progress(url)
        hosts.lose(lost)
        timeline.mark(f"{lost} lost")
        assert not done(url), f"{stage} was over before its host was lost"
        began = time.monotonic()
        hosts.join(lost)
        timeline.mark(f"{lost} joins")
        job.until(partial(further, progress, url, before), what=f"{stage} to go on", seconds=400)
        recovery[stage] = time.monotonic() - began
        timeline.mark(f"{stage} goes on")
        job.until(partial(done, url), what=f"{stage} to end", seconds=400)
        timeline.end(stage)
    result = job.finishes()
    timeline.draw(PICTURE)
    same = {}
    for stage, seconds in recovery.items():
        again = f"{steps_done_again(job)} steps, all trainings together" if stage == "pretrain" else ""
        if stage in TRAININGS:
            missing = lost_samples(join(run, stage), join(calm.run, stage))
            same[stage] = same_training(join(run, stage), join(calm.run, stage))
        else:
            missing = lost_files(f"{run}/{stage}/labels", f"{calm.run}/{stage}/labels")
            same[stage] = missing == 0
        row = Row("host SIGKILLed, another joins", stage, told(same[stage]), missing, again, seconds, 1)
        record("hosts", row)

    assert all(same.values()), same
    for stage in ("free-masks", "pseudo-labels-r1", "held-out-free-masks", "held-out-solo-r0", "held-out-solo-r1"):
        assert label_files(f"{run}/{stage}/labels") == label_files(f"{calm.run}/{stage}/labels")
    assert result["metrics"] == calm.result["metrics"]
    assert result["outputs"]["SOLO round 1"].startswith("models:/freesolo-smoke/")
    versions = MlflowClient(hosts.mlflow.url).search_model_versions("name='freesolo-smoke'")
    assert result["outputs"]["SOLO round 1"].rpartition("/")[2] in {version.version for version in versions}


def part_of_smoke(section: str, calm: Calm, **others: object) -> dict[str, object]:
    """The configuration of a stage of the smoke pipeline, for its own job on the undisturbed pipeline's data."""
    whole = yaml.safe_load((ROOT / "configs/pipeline/smoke.yaml").read_text())
    settings = whole[section]
    if "loop" in settings:
        settings["loop"] |= {"steps": STEPS, "checkpoint_every": EVERY, "record_samples": True}
    if section == "train":
        settings["optimizer"]["learning_rate"] = 0.0001
    return {
        "dataset": f"{calm.bucket}/data/train",
        "resources": {"workers": 2, "label_selector": WORKER},
        "tracking": {"uri": "off"},
        section: settings,
        **others,
    }


@pytest.mark.parametrize("stage", ["pretrain", "free-masks", "solo-r0"])
def test_processes_are_killed_one_after_another(reach: Cluster, calm: Calm, tmp_path: Path, stage: str) -> None:
    """A worker, a data worker, and at last the driver, whose job is then submitted again."""
    hosts, backbone = reach, f"{calm.run}/pretrain/model.pt"
    script, folder, worker, progress, config = {
        "pretrain": ("pretrain_densecl", "pretrain", TRAIN_WORKER, committed, part_of_smoke("pretrain", calm)),
        "free-masks": (
            *("extract_free_masks", "extract", ACTOR, labelled),
            part_of_smoke("extract", calm, weights=backbone, labels=f"{calm.bucket}/runs/killed/extract/labels"),
        ),
        "solo-r0": (
            *("train_solo", "solo", TRAIN_WORKER, committed),
            part_of_smoke("train", calm, labels=f"{calm.run}/free-masks/labels"),
        ),
    }[stage]
    if stage == "solo-r0":
        config["train"] |= {"initial_weights": backbone}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = (f"jobs/{script}.py", "--config", str(path), "--run-name", "killed", "--storage", f"{calm.bucket}/runs")
    url = f"{calm.bucket}/runs/killed/{folder}"

    jobs, rows = [hosts.submit(*arguments)], []
    # A data worker as soon as there is one, the others when something is done that could be lost.
    for name, pattern, least in (
        ("data worker", DATA_WORKER, 0),
        ("worker", worker, 1),
        ("driver", rf"jobs/{script}\.py", 1),
    ):
        jobs[-1].until(lambda least=least: progress(url) >= least, what=f"{stage} to get somewhere")
        _, number = hosts.catch(pattern)
        before = progress(url)
        victims = [number] if name != "driver" else [one for _, one in hosts.find(pattern)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        assert not done(url), f"{stage} was over before its {name} was killed"
        if name == "driver":
            jobs[-1].fails()
            jobs.append(hosts.submit(*arguments))
        jobs[-1].until(partial(further, progress, url, before), what=f"{stage} to go on", seconds=400)
        rows.append((name, time.monotonic() - killed))
    jobs[-1].finishes()

    undisturbed, again = f"{calm.run}/{stage}", steps_done_again(*jobs)
    extracts = stage == "free-masks"
    missing = lost_files(f"{url}/labels", f"{undisturbed}/labels") if extracts else lost_samples(url, undisturbed)
    same = missing == 0 and (extracts or same_training(url, undisturbed))
    for name, seconds in rows:
        twice = f"{again} steps in all three" if again else ""
        record("hosts", Row(f"{name} SIGKILLed", script, told(same), missing, twice, seconds, 1))
    assert missing == 0
    assert same


ELASTIC_STEPS = 64  # of 4 samples: four epochs of the 64 scenes


def lose_power(hosts: Cluster, host: str) -> None:
    hosts.lose(host)


def lose_link(hosts: Cluster, host: str) -> None:
    """For 20 seconds. By then the others have given the node up, and it ends when it hears of that."""
    hosts.network.cut(host)
    time.sleep(20)
    hosts.network.heal(host)
    wait_for(lambda: not hosts.workers[host].alive, what=f"the node on {host} to end")
    hosts.lose(host)


FAULTS = {"host SIGKILLed": lose_power, "link cut for 20 s": lose_link}


@pytest.mark.parametrize("fault", FAULTS)
def test_elastic_training_goes_on_with_fewer_hosts_and_then_with_more(
    reach: Cluster, calm: Calm, tmp_path: Path, fault: str
) -> None:
    hosts, run = reach, f"elastic-{list(FAULTS).index(fault)}"
    config = part_of_smoke("train", calm, labels=f"{calm.run}/free-masks/labels")
    config["train"]["loop"]["steps"] = ELASTIC_STEPS
    # A worker takes all CPUs of a host, and more than the head has: Ray counts nodes without the label too.
    config["resources"] |= {"workers": [1, 2], "cpus_per_worker": 2, "resize_seconds": 5.0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    stage = f"{calm.bucket}/runs/{run}/solo"
    arguments = ("jobs/train_solo.py", "--config", str(path), "--run-name", run, "--storage", f"{calm.bucket}/runs")
    job = hosts.submit(*arguments)

    # It begins with one where a host has yet to get rid of the test's before, and takes the other within seconds.
    job.until(
        lambda: group_sizes(job)[-1:] == ["2"] and committed(stage) >= 2 * EVERY, what="two workers to get somewhere"
    )
    lost, _ = hosts.catch(TRAIN_WORKER)
    sizes_before = len(group_sizes(job))
    struck, before = time.monotonic(), committed(stage)
    FAULTS[fault](hosts, lost)
    job.until(partial(further, committed, stage, before), what="training to go on with one worker", seconds=400)
    recovered = time.monotonic() - struck
    hosts.join(lost)
    again = steps_done_again(job)
    job.finishes()

    used = samples_of_steps(stage)
    epochs = [
        Counter(image for step in range(first, first + 16) for image in used.get(step, ()))
        for first in range(0, ELASTIC_STEPS, 16)
    ]
    sizes = group_sizes(job)[sizes_before - 1 :]
    name, twice = f"{fault}, elastic: {' → '.join(sizes)} workers", f"{again} steps" if again else ""
    missing = sum(64 - len(epoch) for epoch in epochs)
    once = all(len(epoch) == epoch.total() == 64 for epoch in epochs)
    outcome = "each sample once an epoch" if once else "not each sample once an epoch"
    record("hosts", Row(name, "train_solo", outcome, missing, twice, recovered, 1))
    assert once
    assert sizes[-1] == "2"
    assert "1" in sizes, sizes


def group_sizes(job: Submission) -> list[str]:
    """Workers of a training, each time that it began or went on."""
    return re.findall(r"Started training worker group of size (\d)", job.log.read_text())


def test_a_link_that_is_cut_for_20_seconds_costs_an_extraction_nothing(
    reach: Cluster, calm: Calm, tmp_path: Path
) -> None:
    hosts, labels = reach, f"{calm.bucket}/runs/cut/extract/labels"
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(part_of_smoke("extract", calm, weights=f"{calm.run}/pretrain/model.pt", labels=labels))
    )
    stage = f"{calm.bucket}/runs/cut/extract"
    arguments = ("jobs/extract_free_masks.py", "--config", str(path), "--run-name", "cut")
    job = hosts.submit(*arguments, "--storage", f"{calm.bucket}/runs")

    job.until(lambda: labelled(stage) > 0, what="the extraction to get somewhere")
    lost, _ = hosts.catch(ACTOR)
    struck, before = time.monotonic(), labelled(stage)
    lose_link(hosts, lost)
    hosts.join(lost)
    job.until(partial(further, labelled, stage, before), what="the extraction to go on", seconds=400)
    recovered = time.monotonic() - struck
    job.finishes()
    missing = lost_files(labels, f"{calm.run}/free-masks/labels")
    record("hosts", Row("link cut for 20 s", "extract_free_masks", told(missing == 0), missing, "", recovered, 1))
    assert missing == 0


def test_notice_that_a_host_will_go_has_a_checkpoint_saved(reach: Cluster, calm: Calm, tmp_path: Path) -> None:
    """SIGTERM, as Kubernetes sends it before it takes a pod away; the training saves none of its own accord."""
    hosts = reach
    config = part_of_smoke("train", calm, labels=f"{calm.run}/free-masks/labels")
    config["train"]["loop"] |= {"steps": ELASTIC_STEPS, "checkpoint_every": 10_000}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    stage = f"{calm.bucket}/runs/notice/solo"
    arguments = ("jobs/train_solo.py", "--config", str(path), "--run-name", "notice")
    job = hosts.submit(*arguments, "--storage", f"{calm.bucket}/runs")

    job.until(lambda: re.search(r"^solo: [1-9]\d*/", job.log.read_text(), re.MULTILINE), what="some steps")
    host, _ = hosts.catch(TRAIN_WORKER)
    notice = time.monotonic()
    hosts.workers[host].notify()
    job.until(lambda: committed(stage), what="a checkpoint", seconds=NOTICE_SECONDS)
    saved = time.monotonic() - notice
    assert 0 < committed(stage) < ELASTIC_STEPS
    time.sleep(max(0.0, NOTICE_SECONDS - saved))
    hosts.lose(host)
    hosts.join(host)
    job.finishes()
    used = samples_of_steps(stage)
    missing = sum(4 - len(used.get(step, ())) for step in range(ELASTIC_STEPS))
    again = f"{steps_done_again(job)} steps"
    outcome = "checkpoint in time" if saved < NOTICE_SECONDS else "checkpoint too late"
    record("hosts", Row("host taken away on notice", "train_solo", outcome, missing, again, saved, 1))
    assert [len(used[step]) for step in range(ELASTIC_STEPS)] == [4] * ELASTIC_STEPS


def test_of_two_submitters_of_one_label_set_one_proceeds(reach: Cluster, calm: Calm, tmp_path: Path) -> None:
    """Under two names: it is the label set that they share."""
    hosts, labels = reach, f"{calm.bucket}/shared-labels"
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(part_of_smoke("extract", calm, weights=f"{calm.run}/pretrain/model.pt", labels=labels))
    )
    jobs = [
        hosts.submit(
            *("jobs/extract_free_masks.py", "--config", str(path), "--run-name", name),
            *("--storage", f"{calm.bucket}/runs"),
        )
        for name in ("first", "second")
    ]
    began = time.monotonic()
    codes = [job.process.wait(600) for job in jobs]
    assert sorted(codes) == [0, 1], [job.log.read_text()[-3000:] for job in jobs]
    said = jobs[codes.index(1)].log.read_text()
    assert re.search(
        r"error: .*shared-labels/\.lease: process \d+ on .* is at work on this; wait for it, or stop it", said
    )
    missing, seconds = lost_files(labels, f"{calm.run}/free-masks/labels"), time.monotonic() - began
    outcome = "one proceeds, the other says who holds it"
    record("hosts", Row("two submitters", "extract_free_masks", outcome, missing, "", seconds, 1))
    assert missing == 0
