"""The learning rate of a step."""

from __future__ import annotations

import pytest

from freesolo.settings import OptimizerSettings
from freesolo.train.schedule import learning_rate


def test_constant() -> None:
    settings = OptimizerSettings(learning_rate=0.3)
    assert [learning_rate(step, settings, 10) for step in (0, 5, 9)] == [0.3, 0.3, 0.3]


def test_steps_multiply_by_a_tenth_from_their_milestone_on() -> None:
    settings = OptimizerSettings(learning_rate=1.0, schedule="step", milestones=(4, 8))
    rates = [learning_rate(step, settings, 10) for step in (3, 4, 7, 8)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_cosine_falls_from_the_full_rate_through_half_to_almost_nothing() -> None:
    settings = OptimizerSettings(learning_rate=0.4, schedule="cosine")
    assert learning_rate(0, settings, 100) == pytest.approx(0.4)
    assert learning_rate(50, settings, 100) == pytest.approx(0.2)
    assert 0 < learning_rate(99, settings, 100) < 0.001


def test_warmup_is_linear_from_its_factor() -> None:
    # From 0.2 of the rate at step 0 to all of it at step 4: 0.2, 0.4, 0.6, 0.8, 1.
    settings = OptimizerSettings(learning_rate=2.0, warmup_steps=4, warmup_factor=0.2)
    rates = [learning_rate(step, settings, 10) for step in range(6)]
    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


def test_warmup_scales_the_schedule_under_it() -> None:
    cosine = OptimizerSettings(learning_rate=1.0, schedule="cosine")
    warm = OptimizerSettings(learning_rate=1.0, schedule="cosine", warmup_steps=10, warmup_factor=0.0)
    assert learning_rate(5, warm, 20) == pytest.approx(0.5 * learning_rate(5, cosine, 20))
    assert learning_rate(15, warm, 20) == learning_rate(15, cosine, 20)
