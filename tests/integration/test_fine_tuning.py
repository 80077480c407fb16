"""Fractions of labels and several starts, on a real Ray cluster: who trains on what, and what is told of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from freesolo.config import FineTuneJob, TrainJob
from freesolo.config_file import load_config, parse_config
from freesolo.data.files import join, list_files
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest, read_shard
from freesolo.errors import JobError, UsageError
from freesolo.fine_tuning import fine_tune_stage
from freesolo.jobs import predict_held_out, train_stage
from freesolo.models.download import sha256_of_file
from freesolo.models.model_file import load_model, save_model
from freesolo.registry.versions import register_segmenter
from freesolo.settings import TrackingSettings
from freesolo.solo.model import Segmenter
from freesolo.stages import StageFolder, StageResult
from freesolo.tracking.journal import read_journal
from freesolo.tracking.server import resolve_server
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.trainings,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(1200),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]


def two_categories(folder: Path, count: int, seed: int) -> str:
    """An annotated data set of scenes of 6 a shard; the objects of every other one are of one category."""
    path = Path(compose_scenes(str(folder / "photos"), count, size=96, seed=seed))
    document = json.loads(path.read_text())
    document["categories"] = [{"id": 3, "name": "odd"}, {"id": 8, "name": "even"}]
    for annotation in document["annotations"]:
        annotation["category_id"] = 3 if annotation["image_id"] % 2 else 8
    path.write_text(json.dumps(document))
    pack(str(path), str(folder / "data"), samples_per_shard=6)
    return str(folder / "data")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return two_categories(tmp_path_factory.mktemp("labelled"), 16, seed=0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    return two_categories(tmp_path_factory.mktemp("held-out"), 4, seed=1)


def untrained(path: Path, seed: int) -> Path:
    """A segmenter of the smoke configuration's architecture, with the weights that chance gave it."""
    model = load_config(FineTuneJob, ROOT / "configs/fine_tune/smoke.yaml").train.model
    segmenter = Segmenter(model).initialise(torch.Generator().manual_seed(seed))
    save_model(path, "segmenter", model.model_dump(), segmenter.state_dict(), {})
    return path


@pytest.fixture(scope="module")
def freesolo_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(untrained(tmp_path_factory.mktemp("model") / "freesolo.pt", seed=7))


def job_of(labelled: str, held_out: str, *overrides: str) -> FineTuneJob:
    places = (f"dataset={labelled}", f"evaluation_dataset={held_out}", "train.model.num_categories=2")
    return load_config(FineTuneJob, ROOT / "configs/fine_tune/smoke.yaml", [*places, *overrides])


def ids_of(url: str) -> set[int]:
    return {sample.image_id for shard in read_dataset_manifest(url).shards for sample in read_shard(url, shard)}


def test_a_training_sees_its_fraction_and_nothing_else(labelled: str, held_out: str, tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path), "run", "solo")
    whole = job_of(labelled, held_out, "train.loop.steps=3", "train.loop.record_samples=true")
    raw = {"dataset": labelled, "tracking": {"uri": "off"}, "train": whole.train.model_dump(mode="json")}
    job = parse_config(TrainJob, raw | {"label_fraction": 0.3}, source="test")
    result = train_stage(job, folder)
    assert result.counts == {"images": 5, "steps": 3}
    subset = join(folder.run_url, f"labelled-{read_dataset_manifest(labelled).digest[:8]}-0.3-seed-0")
    assert len(ids_of(subset)) == 5
    assert ids_of(subset) < ids_of(labelled)
    used = [
        number
        for path in Path(folder.url, "samples").glob("*.json")
        for _, ids in json.loads(path.read_text())
        for number in ids
    ]
    assert len(used) == 12
    assert set(used) == ids_of(subset)  # 5 photos, 12 samples: each was seen
    lineage = load_model(Path(result.outputs["model"]), "segmenter").lineage
    assert lineage["dataset_digest"] == read_dataset_manifest(labelled).digest
    assert (lineage["label_fraction"], lineage["label_seed"]) == (0.3, 0)
    assert [category["name"] for category in lineage["categories"]] == ["odd", "even"]


def test_what_cannot_be_is_refused_before_anything_is_written(labelled: str, held_out: str, tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path), "run", "fine-tuning")
    with pytest.raises(
        UsageError, match=r"0.01 is 1 of its 16 photos, which leaves 1 of 2 categories .*: (odd|even); 0"
    ):
        fine_tune_stage(job_of(labelled, held_out, "fractions=[0.01, 1.0]", "tracking.uri=off"), folder)
    agnostic = tmp_path / "agnostic"
    pack(compose_scenes(str(agnostic / "photos"), 2, size=96, seed=3), str(agnostic / "data"))
    with pytest.raises(UsageError, match=r"evaluation_dataset: .* does not know category 3 of"):
        fine_tune_stage(job_of(labelled, str(agnostic / "data"), "tracking.uri=off"), folder)
    with pytest.raises(UsageError, match=r"evaluation_dataset: .* is what is trained on"):
        fine_tune_stage(job_of(labelled, labelled, "tracking.uri=off"), folder)
    with pytest.raises(UsageError, match=r"no such weights file"):
        fine_tune_stage(job_of(labelled, held_out, "starts={FreeSOLO: nowhere.pt}", "tracking.uri=off"), folder)
    assert list_files(folder.run_url) == []


def ends_at_the_second(work: Callable[..., Any]) -> Callable[..., Any]:
    """What cannot be done a second time."""
    calls = itertools.count(1)

    def ends(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 2:
            raise JobError("the end of the first attempt")
        return work(*arguments, **keywords)

    return ends


def test_a_run_that_was_begun_needs_its_starts_no_more(
    labelled: str, held_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied are the very versions that were looked at; then the alias moves, and the file is deleted."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = resolve_server(TrackingSettings(), str(tmp_path))
    assert server is not None
    first, second, file = [untrained(tmp_path / f"{seed}.pt", seed) for seed in range(3)]
    register_segmenter(first, "solo", server, experiment="freesolo")
    starts = f"starts={{Free SOLO: models:/solo@candidate, file: {file}, nothing: null}}"
    job, folder = job_of(labelled, held_out, starts, "fractions=[1.0]"), StageFolder(str(tmp_path), "run", "labels")
    sha256 = {name: sha256_of_file(path) for name, path in {"free-solo": first, "file": file}.items()}

    def alias_moves(_: object) -> None:
        register_segmenter(second, "solo", server, experiment="freesolo")

    def ends(*_: object) -> StageResult:
        raise JobError("the end")

    monkeypatch.setattr("freesolo.fine_tuning.connect", alias_moves)  # after the look and before the copies
    monkeypatch.setattr("freesolo.fine_tuning.train_stage", ends)
    for _ in range(2):
        with pytest.raises(JobError, match="the end"):
            fine_tune_stage(job, folder)
        kept = Path(folder.url, "starts")
        assert {path.stem: sha256_of_file(path) for path in kept.glob("*.pt")} == sha256
        assert {path.stem: json.loads(path.read_text()) for path in kept.glob("*.json")} == {
            "free-solo": {
                "weights": "models:/solo@candidate",
                "sha256": sha256["free-solo"],
                "name": "solo",
                "version": "1",
            },
            "file": {"weights": str(file), "sha256": sha256["file"], "name": None, "version": None},
        }
        file.unlink(missing_ok=True)


def test_starts_and_fractions_side_by_side(
    labelled: str, held_out: str, freesolo_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two starts at two fractions; the first attempt ends behind the second training."""
    folder = StageFolder(str(tmp_path), "run", "fine-tuning")
    job = job_of(labelled, held_out, f"starts={{FreeSOLO: {freesolo_model}, nothing: null}}", "train.loop.steps=2")
    with monkeypatch.context() as patch:
        patch.setattr("freesolo.fine_tuning.predict_held_out", ends_at_the_second(predict_held_out))
        with pytest.raises(JobError, match="the end of the first attempt"):
            fine_tune_stage(job, folder)
    models = {path: path.stat().st_mtime_ns for path in Path(folder.run_url).glob("train-*/model.pt")}
    assert len(models) == 2
    result = fine_tune_stage(job, folder)
    assert all(path.stat().st_mtime_ns == written for path, written in models.items()), "trained again"
    names = [f"{start} at {percent} percent" for percent in (25, 100) for start in ("FreeSOLO", "nothing")]
    for name in names:
        for metric in ("segm/AP", "category/AP", "category/AP/odd"):
            assert f"{name}/{metric}".replace(" ", "_") in result.metrics
        assert result.metrics[f"{name}/images".replace(" ", "_")] == 4
    assert fine_tune_stage(job, folder) == result

    asked = {
        path.parent.name: json.loads(path.read_text()) for path in Path(folder.run_url).glob("train-*/settings.json")
    }
    copy = join(folder.url, "starts", "freesolo.pt")
    assert {name: one["train"]["initial_weights"] for name, one in asked.items()} == {
        "train-freesolo-0.25": copy,
        "train-freesolo-1.0": copy,
        "train-nothing-0.25": None,
        "train-nothing-1.0": None,
    }
    kept, given = [load_model(Path(path), "segmenter").state_dict for path in (copy, freesolo_model)]
    assert kept.keys() == given.keys()
    assert all(torch.equal(kept[name], given[name]) for name in given)

    subset = join(folder.run_url, f"labelled-{read_dataset_manifest(labelled).digest[:8]}-0.25-seed-0")
    assert len(ids_of(subset)) == 4
    steps = {
        stage: [entry.step for entry in read_journal(folder.sibling(stage).url)]
        for stage in ("train-freesolo-0.25", "train-nothing-1.0")
    }
    assert set(map(tuple, steps.values())) == {(1, 2)}
    page = Path(result.outputs["report"]).read_text()
    for text in (
        *names,
        "Mask AP, %",
        "AP by category, %",
        "% of the labels",
        f"FreeSOLO: {freesolo_model}, sha256 {sha256_of_file(Path(freesolo_model))}",
        "nothing: random weights",
        "25% of the labels: 4",
        "100% of the labels: 16",
    ):
        assert text in page, text

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("freesolo")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("run")
    assert len(runs) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    for name, value in result.metrics.items():
        if value is not None:
            assert parent.data.metrics[name] == value
    table = Path(client.download_artifacts(parent.info.run_id, "metrics.md", str(tmp_path))).read_text()
    assert all(name in table for name in names)
