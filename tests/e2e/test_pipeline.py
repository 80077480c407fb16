"""README's way, from photos to a picture with masks, by the commands that a person types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from freesolo.data.shards import read_dataset_manifest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def run(folder: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command where a user would, outside the project's folder."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "2"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def freesolo(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", "freesolo.cli", *arguments, code=code)


def pipeline(folder: Path, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(
        folder,
        sys.executable,
        str(ROOT / "jobs" / "run_pipeline.py"),
        "--config",
        str(ROOT / "configs" / "pipeline" / "smoke.yaml"),
        "--run-name",
        "smoke",
        "--storage",
        "runs",
        *overrides,
        code=code,
    )


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, object]:
    """The smoke pipeline on scenes, as `make demo` does it; its result."""
    freesolo(folder, "demo-data", "photos", "--scenes", "24", "--held-out", "8")
    packed = freesolo(folder, "pack", "photos/unlabelled", "data/train", "--samples-per-shard", "16", "--workers", "1")
    assert "data/train: 32 photos in 2 shards" in packed.stdout
    freesolo(folder, "pack", "photos/held-out/annotations.json", "data/held-out", "--workers", "1")
    done = pipeline(folder, "dataset=data/train", "evaluation_dataset=data/held-out")
    result: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_the_pipeline_ends_with_a_page_and_registered_models(folder: Path, finished: dict[str, object]) -> None:
    outputs = finished["outputs"]
    assert isinstance(outputs, dict)
    assert outputs["SOLO on Free Masks"] == "models:/freesolo-smoke/1"
    assert outputs["SOLO round 1"] == "models:/freesolo-smoke/2"
    page = (folder / outputs["report"]).read_text()
    for text in ("Free Mask", "SOLO on Free Masks", "SOLO round 1", "Annotations", "CorLoc"):
        assert text in page
    metrics = finished["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["Free_Mask/images"] == 8
    assert 0 <= metrics["SOLO_round_1/segm/AP50"] <= 1


def test_mlflow_has_the_run_its_stages_and_their_models(folder: Path, finished: dict[str, object]) -> None:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("freesolo")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("smoke")
    assert set(runs) == {
        *("pretrain", "free-masks", "solo-r0", "pseudo-labels-r1", "solo-r1"),
        *("held-out-free-masks", "held-out-solo-r0", "held-out-solo-r1"),
    }
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    for name, child in runs.items():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        data = "data/held-out" if name.startswith("held-out") else "data/train"
        told = {tag.key: tag.value for tag in child.inputs.dataset_inputs[0].tags}
        assert told["digest"] == read_dataset_manifest(str(folder / data)).digest, name
        assert child.data.params["dataset"] == str(folder / data)
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "metrics.md", "report"} <= kept
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "report")] == ["report/index.html"]
    trained = runs["solo-r1"].info.run_id
    assert len(client.get_metric_history(trained, "loss")) == 4
    assert any(file.path.endswith(".png") for file in client.list_artifacts(trained, "images")), "no overlays"
    versions = client.search_model_versions("name = 'freesolo-smoke'")
    assert {version.run_id for version in versions} == {runs["solo-r0"].info.run_id, trained}
    assert set(client.get_registered_model("freesolo-smoke").aliases) == {"candidate", "champion"}


def test_a_finished_run_is_not_done_again(folder: Path, finished: dict[str, object]) -> None:
    again = pipeline(folder, "dataset=data/train", "evaluation_dataset=data/held-out")
    assert json.loads(again.stdout.strip().splitlines()[-1]) == finished
    other = pipeline(folder, "dataset=data/train", "evaluation_dataset=data/held-out", "train.loop.seed=7", code=2)
    assert "error: " in other.stderr
    assert "train.loop.seed: 0, now 7" in other.stderr
    assert "Traceback" not in other.stderr


def test_the_champion_segments_a_photo(folder: Path, finished: dict[str, object]) -> None:
    photo = next((folder / "photos" / "held-out" / "images").glob("*.jpg"))
    model = "models:/freesolo-smoke@champion"
    arguments = ("predict", model, str(photo), "--out", "overlay.png", "--storage", "runs", "--short-side", "96")
    freesolo(folder, *arguments)
    with Image.open(folder / "overlay.png") as overlay, Image.open(photo) as original:
        assert overlay.size == original.size
    wrong = freesolo(folder, *[a.replace("@champion", "@chmpion") for a in arguments], code=2)
    assert "chmpion" in wrong.stderr
    assert "champion" in wrong.stderr.replace("chmpion", "")


def test_everything_can_be_inspected_and_exported(folder: Path, finished: dict[str, object]) -> None:
    run_report = freesolo(folder, "inspect", "runs/smoke").stdout
    assert "solo-r1:" in run_report
    labels = "runs/smoke/pseudo-labels-r1/labels"
    assert "pseudo-labels" in freesolo(folder, "inspect", labels).stdout
    assert "whole (every byte read)" in freesolo(folder, "inspect", "data/train", "--verify").stdout
    freesolo(folder, "export", "coco", labels, "labels.json")
    exported = json.loads((folder / "labels.json").read_text())
    assert len(exported["images"]) == 32
    nothing = freesolo(folder, "inspect", "photos", code=2)
    assert "neither a data set, nor a label set, nor a run" in nothing.stderr


def test_what_is_wrong_is_said_in_one_line(folder: Path) -> None:
    (folder / "empty").mkdir()
    cases = [
        (("pack", "empty", "data/none"), 2, "no photos there"),
        (("pack", "nowhere", "data/none"), 2, "nowhere"),
        (("inspect", "s3://no-such-bucket-of-ours/data"), None, "s3://no-such-bucket-of-ours"),
        (("predict", "no-such-file.pt", "photo.jpg", "--out", "x.png"), 2, "photo.jpg"),
        (("weights", "pull", "densecl-r50-imagenett"), 2, "densecl-r50-imagenet"),
    ]
    environment = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    environment |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    for arguments, code, message in cases:
        command = [sys.executable, "-m", "freesolo.cli", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code if code else done.returncode in (1, 2), done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
