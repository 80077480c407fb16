"""Ablations with real trainings: what rows share is made once, what was stopped goes on, and the table is of its rows.

`make ablations` is `jobs/run_ablations.py` on the demo's scenes; what it would do is looked at without doing it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from freesolo import ablations, pipeline
from freesolo.ablations import ablations_stage
from freesolo.comparison import Comparison, OverShards, compare
from freesolo.config import AblationJob, TrainJob
from freesolo.config_file import load_config
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.errors import JobError, UsageError
from freesolo.jobs import train_stage
from freesolo.stages import StageFolder, StageResult
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.trainings,
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(1200),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]

# Its stages: what both rows begin with, and of each its own training and predictions.
SHARED = ("pretrain", "free-masks", "held-out-free-masks")
OWN = ("solo-r0", "held-out-solo-r0")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An annotated data set of 8 scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    pack(compose_scenes(str(folder / "photos"), 8, size=96, seed=0), str(folder / "data"), samples_per_shard=4)
    return str(folder / "data")


def ablation_job(dataset: str, *overrides: str) -> AblationJob:
    """Two rows, and steps enough to be begun and ended."""
    small = (
        "rounds=0",
        "seeds=[1]",
        "rows={no pairs: {train.losses.pairwise: 0.0}}",
        "train.loop.steps=2",
        "pretrain.loop.steps=1",
    )
    places = (f"dataset={dataset}", f"evaluation_dataset={dataset}")
    return load_config(AblationJob, ROOT / "configs/ablations/smoke.yaml", [*places, *small, *overrides])


def stages(run: Path) -> dict[str, int]:
    """When each finished stage of a run was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/result.json")}


def settings(run: Path, kind: str) -> dict[str, Any]:
    """What each stage of a kind was asked to do, by the stage's name."""
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/settings.json")}
    return {name: asked for name, asked in found.items() if name.startswith(f"{kind}-")}


def test_rows_share_their_stages_and_what_was_stopped_goes_on(
    scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, job, run = StageFolder(str(tmp_path), "run", "ablations"), ablation_job(scenes), tmp_path / "run"
    done = []

    def until_the_second_row(job: TrainJob, folder: StageFolder, parent_url: str | None = None) -> StageResult:
        if done:
            raise JobError("a worker is lost")
        done.append(folder)
        return train_stage(job, folder, parent_url)

    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "train_stage", until_the_second_row)
        with pytest.raises(JobError, match=r"^no pairs, seed 1: a worker is lost$"):
            ablations_stage(job, folder)
    before = stages(run)
    assert kinds(before) == dict.fromkeys((*SHARED, *OWN), 1)

    monkeypatch.setattr(ablations, "compare", scored_by_settings(run))
    result = ablations_stage(job, folder)
    after = stages(run)
    assert kinds(after) == {**dict.fromkeys(SHARED, 1), **dict.fromkeys(OWN, 2), "ablations": 1}
    assert {name: after[name] for name in before} == before, "what was done is not done again"
    assert result.counts == {"rows": 2, "seeds": 1, "trainings": 3}
    assert ablations_stage(job, folder) == result
    assert stages(run) == after
    with pytest.raises(UsageError, match=r"rows.no pairs.train.losses.pairwise: 0.0, now 0.5"):
        ablations_stage(ablation_job(scenes, "rows={no pairs: {train.losses.pairwise: 0.5}}"), folder)

    trained = settings(run, "solo-r0")
    asked = {(one["train"]["losses"]["pairwise"], one["train"]["loop"]["seed"]) for one in trained.values()}
    assert asked == {(1.0, 1), (0.0, 1)}
    assert [one["pretrain"]["loop"]["seed"] for one in settings(run, "pretrain").values()] == [1]
    assert_the_table_is_of_its_rows(run, result)
    assert_mlflow_has_it(tmp_path, run, result)


def kinds(names: dict[str, int]) -> dict[str, int]:
    """How many stages there are of each kind."""
    return dict(Counter(re.sub(r"-[0-9a-f]{8}$", "", name) for name in names))


def scored_by_settings(run: Path) -> Callable[..., Comparison]:
    """An evaluation that finds in each label set what its model was trained with, which so few steps would not show.

    AP50 is 0.5 of SOLO, 0.3 of SOLO without pairs and 0.01 of Free Mask, and with seed 1 a tenth more.
    """

    def evaluate(dataset: str, label_sets: Mapping[str, str], *, over_shards: OverShards) -> Comparison:
        comparison = compare(dataset, label_sets, over_shards=over_shards)
        assert list(label_sets) == list(label_sets.values()), "label sets go by their URLs"
        scored = {
            url: replace(row, segm=replace(row.segm, ap50=ap50_of(json.loads(made_by(url).read_text()))))
            for url, row in comparison.rows.items()
        }
        return replace(comparison, rows=scored)

    def made_by(url: str) -> Path:
        """The settings of the stage that wrote a label set or a model; it is in the run."""
        return run / Path(url).relative_to(run).parts[0] / "settings.json"

    def ap50_of(labelling: dict[str, Any]) -> float:
        model = json.loads(made_by(labelling["weights"]).read_text())
        if "pretrain" in model:
            return 0.01 + 0.1 * model["pretrain"]["loop"]["seed"]
        return (0.5 if model["train"]["losses"]["pairwise"] else 0.3) + 0.1 * model["train"]["loop"]["seed"]

    return evaluate


def assert_the_table_is_of_its_rows(run: Path, result: StageResult) -> None:
    """Without pairs it is 0.2 less; a single seed has no deviation."""
    for name, value in {
        "base/AP50": 0.6,
        "no_pairs/AP50": 0.4,
        "no_pairs/AP50_difference": -0.2,
        "base/Free_Mask_AP50": 0.11,
        "no_pairs/Free_Mask_AP50": 0.11,
    }.items():
        assert result.metrics[name] == pytest.approx(value), name
        assert result.metrics[f"{name}_deviation"] is None
    assert result.metrics["base/AP50_difference"] is None
    page = (run / "ablations" / "ablations.md").read_text()
    assert "- no pairs: `train.losses.pairwise: 0.0`" in page
    assert "| base | 60.0 ± - | - |" in page
    assert "| no pairs | 40.0 ± - | -20.0 ± - |" in page


def assert_mlflow_has_it(storage: Path, run: Path, result: StageResult) -> None:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("freesolo")
    assert experiment is not None
    runs = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("run")
    assert {one.data.tags["mlflow.parentRunId"] for one in runs.values()} == {parent.info.run_id}
    assert set(runs) == set(stages(run)) - {"ablations"}
    told = {name: value for name, value in result.metrics.items() if value is not None}
    assert {name: parent.data.metrics[name] for name in told} == told
    table = client.download_artifacts(parent.info.run_id, "ablations.md", str(storage))
    assert Path(table).read_text() == (run / "ablations" / "ablations.md").read_text()


def test_make_ablations_is_the_job_on_the_demos_scenes() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    done = subprocess.run(
        ["make", "--dry-run", "ablations"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    (line,) = [
        line for line in done.stdout.replace("\\\n", "").splitlines() if "jobs/run_ablations.py --config" in line
    ]
    words = shlex.split(line)
    overrides = [word for word in words if "=" in word]
    job = load_config(AblationJob, ROOT / words[words.index("--config") + 1], overrides)
    assert (job.dataset, job.evaluation_dataset) == tuple(
        str(Path.cwd() / "demo/data" / name) for name in ("train", "held-out")
    )
    assert "demo/data/held-out/manifest.json" in done.stdout
