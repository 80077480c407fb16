"""Fine-tuning from several starts: what its trainings are, what is drawn of them, and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from freesolo.config import FineTuneJob, load_config
from freesolo.errors import UsageError
from freesolo.fine_tuning import train_settings

ROOT = Path(__file__).parents[2]


def test_a_fraction_trains_for_as_many_epochs_but_no_less_than_it_must() -> None:
    job = load_config(FineTuneJob, ROOT / "configs/fine_tune/coco_r50.yaml")
    few, many = train_settings(job, 0.05), train_settings(job, 0.2)
    assert (few.loop.steps, few.optimizer.milestones) == (9000, (6000, 8000))
    assert (many.loop.steps, many.optimizer.milestones) == (18000, (12000, 16000))
    assert train_settings(job.model_copy(update={"min_steps": 1}), 0.07).loop.steps == 6300  # of 90,000; in floats more
    assert train_settings(job, 1.0) == job.train
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
