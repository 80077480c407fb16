"""Each shipped configuration loads, and opens with its command, its hardware and what to expect of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from freesolo.config import (
    AblationJob,
    EvaluateJob,
    ExtractJob,
    FineTuneJob,
    Job,
    PackJob,
    PipelineJob,
    PredictJob,
    PretrainJob,
    TrainJob,
    TuneJob,
)
from freesolo.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
JOBS: dict[str, tuple[type[Job], str]] = {
    "pack": (PackJob, "pack_shards"),
    "pretrain": (PretrainJob, "pretrain_densecl"),
    "extract": (ExtractJob, "extract_free_masks"),
    "train": (TrainJob, "train_solo"),
    "fine_tune": (FineTuneJob, "fine_tune"),
    "tune": (TuneJob, "tune_solo"),
    "predict": (PredictJob, "predict"),
    "evaluate": (EvaluateJob, "evaluate"),
    "pipeline": (PipelineJob, "run_pipeline"),
    "ablations": (AblationJob, "run_ablations"),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_loads_and_introduces_itself(path: Path) -> None:
    job_type, job = JOBS[path.parent.name]
    load_config(job_type, path)
    opening = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    text = "\n".join(opening)
    assert f"python jobs/{job}.py --config configs/{path.relative_to(CONFIGS)}" in text
    assert "Hardware:" in text
    assert "Expected:" in text or "Not yet run" in text


def test_each_kind_of_job_has_a_configuration() -> None:
    assert {path.parent.name for path in CONFIGS.rglob("*.yaml")} == set(JOBS)
