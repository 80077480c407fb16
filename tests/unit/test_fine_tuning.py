"""Fine-tuning from several starts: what its trainings are, what is drawn of them, and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from freesolo.config import FineTuneJob
from freesolo.config_file import load_config
from freesolo.errors import UsageError
from freesolo.evaluation import CategoryMetrics, Metrics, RegionMetrics
from freesolo.fine_tuning import _Trained, train_settings, trends
from freesolo.report.records import Trend
from freesolo.settings import TrainSettings
from freesolo.stages import StageFolder, StageResult

ROOT = Path(__file__).parents[2]


def test_a_fraction_trains_for_as_many_epochs_but_no_less_than_it_must() -> None:
    job = load_config(FineTuneJob, ROOT / "configs/fine_tune/coco_r50.yaml")
    few, many = train_settings(job, 0.05), train_settings(job, 0.2)
    assert (few.loop.steps, few.optimizer.milestones) == (9000, (6000, 8000))
    assert (many.loop.steps, many.optimizer.milestones) == (18000, (12000, 16000))
    assert train_settings(job.model_copy(update={"min_steps": 1}), 0.07).loop.steps == 6300  # of 90,000; in floats more
    assert train_settings(job, 1.0) == job.train
    fewest = train_settings(job.model_copy(update={"min_steps": 1}), 0.00001)
    assert (fewest.loop.steps, fewest.optimizer.milestones) == (1, (1, 1))
    assert TrainSettings.model_validate(fewest.model_dump()) == fewest
    assert train_settings(job.model_copy(update={"min_steps": None}), 0.01) == job.train


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fractions=[0.1, 0.05]", r"fractions=\[0.1, 0.05\]: must ascend, each once"),
        ("fractions=[]", r"at least one of each"),
        ("starts={Free SOLO: null, free-solo: null}", r"two names differ in capitals or spaces only"),
        ("starts={A B: null, A_B: null}", r"starts, fractions: 2 of them would be A_B_at_25_percent among the metrics"),
        ("fractions=[0.1, 0.10000001]", r"starts, fractions: 2 of them would be nothing_at_10_percent"),
        ("starts={50%: null}", r"starts"),
        ("train.initial_weights=densecl-r50-imagenet", r"each of the starts has its own"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_config(FineTuneJob, ROOT / "configs/fine_tune/smoke.yaml", [override])


def trained(start: str, fraction: float) -> _Trained:
    folder = StageFolder("storage", "run", "train")
    return _Trained(start, fraction, folder, StageResult("train", 1.0), "labels")


def metrics(ap: float | None, by_category: float | None = None) -> Metrics:
    region = RegionMetrics(ap, *[0.5] * 11)
    return Metrics(region, region, 0.5, 1, 1, 1, CategoryMetrics(by_category, 0.5, {}) if by_category else None)


def test_trends_are_a_line_a_start_in_percent_of_both() -> None:
    """In floats 0.07 is 7.000000000000001 percent, and 0.29 is 28.999999999999996."""
    rows = {
        "A b at 7 percent": metrics(0.29, 0.07),
        "nothing at 7 percent": metrics(0.0),
        "A b at 100 percent": metrics(0.57, 0.14),
        "nothing at 100 percent": metrics(None, 0.28),
    }
    trainings = [trained(start, fraction) for fraction in (0.07, 1.0) for start in ("A b", "nothing")]
    assert trends(trainings, rows) == (
        Trend("A b", "Mask AP, %", "% of the labels", (7.0, 100.0), (29.0, 57.0)),
        Trend("nothing", "Mask AP, %", "% of the labels", (7.0, 100.0), (0.0, None)),
        Trend("A b", "AP by category, %", "% of the labels", (7.0, 100.0), (7.0, 14.0)),
        Trend("nothing", "AP by category, %", "% of the labels", (7.0, 100.0), (None, 28.0)),
    )
    agnostic = {name: metrics(0.5) for name in rows}
    assert [(trend.name, trend.chart, trend.values) for trend in trends(trainings, agnostic)] == [
        ("A b", "Mask AP, %", (50.0, 50.0)),
        ("nothing", "Mask AP, %", (50.0, 50.0)),
    ]
