"""A stage is done once, for the settings that it was started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from freesolo.config import TrainJob
from freesolo.config_file import parse_config
from freesolo.errors import JobError, UsageError
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made


def nothing() -> None:
    """A stage that starts from nothing."""


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    folder, calls = StageFolder(str(tmp_path), "run", "extract"), []

    def prepare() -> str:
        calls.append("prepare")
        return "inputs"

    def work(inputs: str) -> StageResult:
        calls.append(f"work on {inputs}")
        return StageResult("extract", 1.5, {"labels": "somewhere"}, {"images": 3}, {"AP": None})

    first = run_stage(folder, {"a": 1}, prepare, work)
    assert run_stage(folder, {"a": 1}, prepare, work) == first
    assert calls == ["prepare", "work on inputs"]
    assert json.loads((tmp_path / "run" / "extract" / "result.json").read_text())["counts"] == {"images": 3}


def test_a_stage_that_failed_is_done_again(tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path), "run", "extract")

    def fail(_: None) -> StageResult:
        raise JobError("the disk is full")

    with pytest.raises(JobError):
        run_stage(folder, {"a": 1}, nothing, fail)
    assert run_stage(folder, {"a": 1}, nothing, lambda _: StageResult("extract", 0.0)).stage == "extract"


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_under_the_same_name_are_refused(tmp_path: Path, finished: bool) -> None:
    folder = StageFolder(str(tmp_path), "run", "train")

    def work(_: None) -> StageResult:
        if not finished:
            raise JobError("stopped")
        return StageResult("train", 0.0)

    if finished:
        run_stage(folder, {"loop": {"steps": 10, "seed": 0}}, nothing, work)
    else:
        with pytest.raises(JobError):
            run_stage(folder, {"loop": {"steps": 10, "seed": 0}}, nothing, work)
    with pytest.raises(UsageError, match=r"run 'run' .* loop.steps: 10, now 20; .* another --run-name"):
        run_stage(folder, {"loop": {"steps": 20, "seed": 0}}, nothing, work)


def test_tuples_and_lists_are_the_same_settings(tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path), "run", "train")
    first = run_stage(folder, {"sizes": (1, 2)}, nothing, lambda _: StageResult("train", 1.0))
    again = run_stage(folder, {"sizes": [1, 2]}, nothing, lambda _: StageResult("train", 2.0))
    assert again == first


def test_stages_of_a_run_lie_side_by_side() -> None:
    folder = StageFolder("s3://bucket/runs", "photos", "solo-r1")
    assert folder.url == "s3://bucket/runs/photos/solo-r1"
    assert folder.sibling("solo-r2").url == "s3://bucket/runs/photos/solo-r2"


def test_a_run_may_go_on_with_other_workers_and_another_budget(tmp_path: Path) -> None:
    def made(**changes: object) -> dict[str, object]:
        loop = {"steps": 10, "batch_size": 4, **{name: changes.pop(name) for name in ("seed",) if name in changes}}
        stream = {"max_bad_samples": changes.pop("max_bad_samples", 0.0)}
        raw = {"dataset": "d", "train": {"loop": loop, "stream": stream}, **changes}
        return what_is_made(parse_config(TrainJob, raw, source="test"))

    assert made(resources={"workers": 2}, tracking={"uri": "off"}, max_bad_samples=0.5) == made()
    assert made(seed=1) != made()
    assert made(labels="others") != made()


def test_what_is_refused_leaves_nothing_and_what_is_done_is_not_prepared(tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path), "run", "train")

    def refuse() -> None:
        raise UsageError("no data set there")

    with pytest.raises(UsageError, match="no data set there"):
        run_stage(folder, {"dataset": "typo"}, refuse, lambda _: StageResult("train", 1.0))
    assert not any(tmp_path.iterdir())
    done = run_stage(folder, {"dataset": "right"}, nothing, lambda _: StageResult("train", 1.0))
    assert run_stage(folder, {"dataset": "right"}, refuse, lambda _: StageResult("train", 2.0)) == done
