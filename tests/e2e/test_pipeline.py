"""README's way, from photos to a picture with masks, by the commands that a person types."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from freesolo import cli
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def run(folder: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command where a user would, outside the project's folder, and not from within `make test`."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "2"}
    for name in ("RAY_ADDRESS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def make_demo(folder: Path, *variables: str) -> tuple[dict[str, Any], Path]:
    """`make demo` at the size of a smoke test; its result and the page that it names, last."""
    small = ("DEMO_CONFIG=configs/pipeline/smoke.yaml", "DEMO_SCENES=24", "DEMO_HELD_OUT=8", *variables)
    *_, result, last = run(ROOT, "make", "demo", f"DEMO={folder}", *small).stdout.splitlines()
    start, page = last.split("open ")
    assert start == "demo: "
    return json.loads(result), Path(page)


def pipeline(folder: Path, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The demo's run, submitted again."""
    arguments = ("--config", str(ROOT / "configs" / "pipeline" / "smoke.yaml"), "--run-name", "demo")
    arguments += ("--storage", "runs", "dataset=data/train", "evaluation_dataset=data/held-out", *overrides)
    return run(folder, sys.executable, str(ROOT / "jobs" / "run_pipeline.py"), *arguments, code=code)


@pytest.fixture(scope="module")
def demo(folder: Path) -> tuple[dict[str, Any], Path]:
    """The result of `make demo`, and its page."""
    return make_demo(folder)


@pytest.fixture(scope="module")
def finished(demo: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    """The result of `make demo`."""
    return demo[0]


def test_the_demo_ends_with_a_page_and_registered_models(demo: tuple[dict[str, Any], Path]) -> None:
    finished, path = demo
    outputs = finished["outputs"]
    assert outputs["SOLO on Free Masks"] == "models:/freesolo-smoke/1"
    assert outputs["SOLO round 1"] == "models:/freesolo-smoke/2"
    assert str(path) == outputs["report"]
    page = path.read_text()
    for text in ("Free Mask", "SOLO on Free Masks", "SOLO round 1", "Annotations", "CorLoc", "What it found, grouped"):
        assert text in page
    assert "Frozen features" in page
    assert finished["metrics"]["Free_Mask/images"] == 8
    assert 0 <= finished["metrics"]["SOLO_round_1/segm/AP50"] <= 1


def test_mlflow_has_the_run_its_stages_and_their_models(folder: Path, finished: dict[str, Any]) -> None:
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("freesolo")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("demo")
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
    pretrained = runs["pretrain"].info.run_id
    assert [metric.step for metric in client.get_metric_history(pretrained, "probe/retrieval_top1")] == [2, 4]
    maps = [file.path for file in client.list_artifacts(pretrained, "images") if file.path.endswith(".png")]
    assert any("similarity" in path for path in maps), "no similarity maps"
    versions = client.search_model_versions("name = 'freesolo-smoke'")
    assert {version.run_id for version in versions} == {runs["solo-r0"].info.run_id, trained}
    assert set(client.get_registered_model("freesolo-smoke").aliases) == {"candidate", "champion"}
    location = client.get_model_version_download_uri("freesolo-smoke", "2")
    described = mlflow.artifacts.download_artifacts(f"{location}/MLmodel", tracking_uri=client.tracking_uri)
    served = yaml.safe_load(Path(described).read_text())["flavors"]["python_function"]["config"]["predict"]
    assert (served["short_side"], served["long_side_max"], served["max_width"]) == (128, 192, 1.0), "as it was trained"


def test_a_finished_run_is_not_done_again(folder: Path, finished: dict[str, Any]) -> None:
    again = pipeline(folder)
    assert json.loads(again.stdout.strip().splitlines()[-1]) == finished
    other = pipeline(folder, "train.loop.seed=7", code=2)
    assert "error: " in other.stderr
    assert "train.loop.seed: 0, now 7" in other.stderr
    assert "Traceback" not in other.stderr


def test_the_champion_segments_a_photo(folder: Path, finished: dict[str, Any]) -> None:
    """By the console script itself, in the folder in which a person would be."""
    photo = next((folder / "photos" / "held-out" / "images").glob("*.jpg"))
    freesolo = str(Path(sys.executable).parent / "freesolo")
    model = "models:/freesolo-smoke@champion"
    run(folder, freesolo, "predict", model, str(photo), "--out", "overlay.png", "--short-side", "96")
    with Image.open(folder / "overlay.png") as overlay, Image.open(photo) as original:
        assert overlay.size == original.size


def test_everything_can_be_inspected_and_exported(
    folder: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    labels = "runs/demo/pseudo-labels-r1/labels"
    for command, found in (
        (("inspect", "runs/demo"), "solo-r1:"),
        (("inspect", labels), "pseudo-labels"),
        (("inspect", "data/train", "--verify"), "whole (every byte read)"),
        (("export", "coco", labels, "labels.json"), "labels.json"),
    ):
        assert cli.main(command) == 0
        assert found in capsys.readouterr().out
    assert len(json.loads((folder / "labels.json").read_text())["images"]) == 32


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """Fewer than a batch of DenseCL, and one of them no photo at all."""
    photos = tmp_path / "my photos"
    compose_scenes(str(photos), 5, size=96, seed=5)
    (photos / "notes.jpg").write_text("not a photo")
    return photos


def test_each_folder_of_photos_is_a_run_of_its_own(own_photos: Path, tmp_path: Path) -> None:
    """As `make demo` would do it, without doing it: same photos, same run; other photos in the folder, another run."""

    def would_do() -> list[str]:
        variables = (f"DEMO={tmp_path}", f"PHOTOS={own_photos}")
        return re.findall(r"own-\d+", run(ROOT, "make", "--dry-run", "demo", *variables).stdout)

    first, again = would_do(), would_do()
    (own_photos / "notes.jpg").unlink()
    other = would_do()
    assert len(first) == len(other) > 3
    assert set(first) == set(again)
    assert len(set(first)) == len(set(other)) == 1
    assert set(first) != set(other)


@pytest.mark.slow
def test_the_demo_takes_a_persons_own_photos(folder: Path, own_photos: Path) -> None:
    result, page = make_demo(folder, f"PHOTOS={own_photos}")
    assert page.read_text().count('class="stage"') == 5
    assert "CorLoc" not in page.read_text(), "an evaluation of photos without annotations"
    assert set(result["outputs"]) == {"report", "SOLO on Free Masks", "SOLO round 1", "DenseCL"}
    assert make_demo(folder, f"PHOTOS={own_photos}") == (result, page), "a finished run is done again"
