"""Search spaces: what is drawn, and what is refused before anything is started."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from freesolo.cluster import Node, share_out
from freesolo.config import TuneJob
from freesolo.config_file import parse_config
from freesolo.errors import JobError, UsageError
from freesolo.settings import RangeSettings, ResourceSettings, TrainSettings
from freesolo.space import draw_trials, with_values
from freesolo.stages import StageFolder, what_is_made
from freesolo.sweep import TrialOutcome
from freesolo.tuning import as_table, best_of, tune_stage

RATE = "train.optimizer.learning_rate"


def tune_job(space: dict[str, Any], *, held_out: str | None = None, **tune: Any) -> TuneJob:
    train = {"loop": {"steps": 4, "batch_size": 8}}
    raw = {"dataset": "data", "evaluation_dataset": held_out, "train": train, "tune": {"space": space, **tune}}
    return parse_config(TuneJob, raw, source="test")


def test_draws_are_combined_with_every_point_of_the_grids() -> None:
    space = {
        "rate": RangeSettings(loguniform=(1e-4, 1e-2)),
        "batch": RangeSettings(grid=(4, 8)),
        "decay": RangeSettings(uniform=(0.0, 1.0)),
        "method": RangeSettings(grid=("sgd", "adamw")),
        "warmup": RangeSettings(choice=(0, 10, [1, 2])),
    }
    trials = draw_trials(space, draws=50, seed=0)
    assert trials == draw_trials(space, draws=50, seed=0)
    assert trials != draw_trials(space, draws=50, seed=1)
    assert len(trials) == 200
    assert all(list(trial) == list(space) for trial in trials)
    for start in range(0, 200, 4):
        points = [(trial["batch"], trial["method"]) for trial in trials[start : start + 4]]
        assert points == list(itertools.product((4, 8), ("sgd", "adamw")))
        assert len({trial["rate"] for trial in trials[start : start + 4]}) == 1, "one draw, at each point"
    rates = sorted(float(str(trial["rate"])) for trial in trials[::4])
    assert 1e-4 <= rates[0] <= rates[-1] <= 1e-2
    assert 3e-4 < rates[25] < 3e-3, "half of them in the lower decade"
    assert 0.3 < sum(float(str(trial["decay"])) for trial in trials) / 200 < 0.7
    assert {str(trial["warmup"]) for trial in trials} == {"0", "10", "[1, 2]"}


def test_more_draws_leave_the_first_as_they_are() -> None:
    space = {"rate": RangeSettings(uniform=(0.0, 1.0)), "batch": RangeSettings(grid=(4, 8))}
    assert draw_trials(space, draws=5, seed=3)[:4] == draw_trials(space, draws=2, seed=3)


def test_the_order_of_a_space_does_not_matter() -> None:
    space = {
        "rate": RangeSettings(uniform=(0.0, 1.0)),
        "batch": RangeSettings(grid=(4, 8)),
        "decay": RangeSettings(uniform=(0.0, 1.0)),
        "method": RangeSettings(grid=("sgd", "adamw")),
    }
    backwards = dict(reversed(space.items()))
    assert draw_trials(space, draws=3, seed=0) == draw_trials(backwards, draws=3, seed=0)


def test_values_replace_settings_and_nothing_else() -> None:
    settings = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert with_values(settings, {"a.c.d": 5, "e": [1]}) == {"a": {"b": 1, "c": {"d": 5}}, "e": [1]}
    assert settings == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_a_trial_is_the_training_that_its_values_say() -> None:
    space = {RATE: {"grid": [0.5]}, "train.views.short_sides": {"grid": [[64], [96, 128]]}}
    job = tune_job(space, held_out="held-out", scheduler="none")
    first, second = [job.trial_job(values) for values in job.trials()]
    assert first.train.optimizer.learning_rate == second.train.optimizer.learning_rate == 0.5
    assert first.train.optimizer.warmup_steps == job.train.optimizer.warmup_steps
    assert (first.train.views.short_sides, second.train.views.short_sides) == ((64,), (96, 128))


def test_a_whole_section_may_be_chosen_and_keeps_its_defaults() -> None:
    job = tune_job({"train.optimizer": {"grid": [{"method": "adamw"}, {"learning_rate": 0.5}]}})
    first, second = [job.trial_job(values).train.optimizer for values in job.trials()]
    assert (first.method, first.learning_rate, first.warmup_steps) == ("adamw", 0.001, 1000)
    assert (second.method, second.learning_rate) == ("sgd", 0.5)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.optimiser.learning_rate": {"grid": [1.0]}}, "did you mean train.optimizer[?] there are train.model, "),
        ({"train.optimizer.rate": {"grid": [1.0]}}, "no such setting; .*there are .*train.optimizer.learning_rate, "),
        ({f"{RATE}.x": {"grid": [1.0]}}, f"no such setting; there are none inside of {RATE}$"),
        (
            {"resources.workers": {"grid": [1, 2]}},
            "no such setting; there are dataset, labels, label_fraction, label_seed, train$",
        ),
        ({RATE: {"uniform": [-1.0, 1.0]}}, "learning_rate=-1.0: input should be greater than 0"),
        ({RATE: {"choice": [0.1] * 99 + ["fast"]}}, "learning_rate='fast': input should be a valid number"),
        ({"train.loop.steps": {"uniform": [2, 9]}}, "train.loop.steps=2.0: input should be a valid integer"),
        ({RATE: {"loguniform": ["1e-4", 0.1]}}, "write 1.0e-4"),
        ({RATE: {"loguniform": [0.0, 0.1]}}, "there is no logarithm of the first"),
        ({RATE: {"uniform": [0.2, 0.1]}}, r"give \[low, high\]"),
        ({RATE: {"grid": []}}, "has nothing to try"),
        ({RATE: {"grid": [0.1], "choice": [0.1]}}, "give one of choice, uniform, loguniform and grid, not 2"),
        ({RATE: {"normal": [0.1, 1.0]}}, "normal: no such setting"),
        ({RATE: {"grid": [0.1]}, "train.optimizer": {"grid": [{}]}}, f"{RATE} is part of train.optimizer"),
        ({"train.loop.accumulation_steps": {"grid": [1, 3]}}, "accumulation_steps=3: .*batch_size=8 must divide"),
        ({}, "at least 1 item"),
    ],
)
def test_a_space_that_cannot_be_is_refused_at_once(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tune_job(space)


@pytest.mark.parametrize("metric", ["los", "loss/dice", "loss/embedding"])
def test_a_metric_that_a_trial_does_not_report_is_refused_at_once(metric: str) -> None:
    """The embedding's loss is reported by the first trial, and not by the second."""
    space = {"train.losses.embedding": {"grid": [1.0, 0.0]}}
    with pytest.raises(UsageError, match=rf"tune.metric={metric}: .* does not report it; it reports loss, "):
        tune_job(space, held_out="held-out", scheduler="none", metric=metric)
    tune_job(space, held_out="held-out", scheduler="none", metric="loss/pairwise")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "other"),
        ("label_fraction", 0.5),
        ("train.losses", {}),
        ("train.losses.pairwise", 0.5),
        ("train.views.flip_probability", 0.5),
        ("train.model", {}),
        ("train.model.num_categories", 2),
        ("train.model.grid_sizes", [20, 18, 12, 8, 6]),
        ("train.model.strides", [8, 8, 16, 32, 64]),
        ("train.model.centre_sigma", 0.5),
    ],
)
def test_losses_that_measure_different_things_are_not_compared(name: str, value: Any) -> None:
    space = {name: {"grid": [value]}}
    message = f"with another {name} loss measures something else, .*give an evaluation_dataset, and tune.scheduler=none"
    for how in ({}, {"scheduler": "none"}, {"held_out": "held-out"}):
        with pytest.raises(UsageError, match=message):
            tune_job(space, **how)
    tune_job(space, held_out="held-out", scheduler="none")
    tune_job(space, metric="images_per_second", mode="max")


def test_losses_of_other_networks_are_compared_and_of_other_scales_are_not() -> None:
    tune_job({"train.model.backbone": {"grid": ["resnet18", "resnet50"]}, "train.model.head": {"grid": [{}]}})
    with pytest.raises(UsageError, match=r"with another train.model.scale_ranges loss measures something else"):
        tune_job({"train.model.scale_ranges": {"grid": [[]]}})


def test_models_of_one_category_have_no_ap_by_category() -> None:
    space = {"train.model.num_categories": {"grid": [2, 1]}}
    with pytest.raises(UsageError, match=r"category/AP: a model of one category has none; give train.model.num_cat"):
        tune_job(space, held_out="held-out", evaluation_metric="category/AP", scheduler="none")
    tune_job(space, held_out="held-out", evaluation_metric="segm/AP50", scheduler="none")


def test_elastic_workers_are_refused() -> None:
    raw = tune_job({RATE: {"grid": [0.1]}}).model_dump(mode="json") | {"resources": {"workers": [1, 2]}}
    with pytest.raises(UsageError, match=r"resources.workers: .* give one number"):
        parse_config(TuneJob, raw, source="test")


def test_how_many_run_at_once_does_not_change_the_sweep() -> None:
    one, other = [tune_job({RATE: {"grid": [0.1]}}, max_concurrent=number) for number in (1, 2)]
    assert what_is_made(one) == what_is_made(other) != what_is_made(tune_job({RATE: {"grid": [0.2]}}))


def test_trainings_beside_each_other_have_cpus_of_their_own_to_read_with() -> None:
    """6 CPUs hold three of a worker and a reader. 16 CPUs with 2 GPUs hold two; each has 16 / 2 - 4 CPUs to read."""
    assert share_out(ResourceSettings(), [Node({"CPU": 6.0})], at_most=9) == (3, 1)
    assert share_out(ResourceSettings(), [Node({"CPU": 6.0})], at_most=2) == (2, 2)
    assert share_out(ResourceSettings(workers=2), [Node({"CPU": 6.0})], at_most=9) == (2, 1)
    on_gpus = ResourceSettings(cpus_per_worker=4, gpus_per_worker=1.0)
    node = Node({"CPU": 16.0, "GPU": 2.0})
    assert share_out(on_gpus, [node], at_most=9) == (2, 4)
    assert share_out(on_gpus.model_copy(update={"data_cpus": 2}), [node], at_most=9) == (2, 2)


def test_the_best_is_of_those_that_went_to_the_end() -> None:
    def outcome(name: str, state: Any, metric: float | None, reason: str | None = None) -> TrialOutcome:
        return TrialOutcome(name, {"rate": 0.1}, state, 4, metric, reason)

    outcomes = [
        outcome("a", "finished", 2.0),
        outcome("b", "finished", 1.0),
        outcome("c", "stopped early", 0.5),
        outcome("d", "finished", 1.0),
        outcome("e", "failed", None, "no room"),
    ]
    assert best_of(outcomes, "min").name == "b"
    assert best_of(outcomes, "max").name == "a"
    with pytest.raises(JobError, match="none of 2 trials went to the end: no room"):
        best_of([outcomes[2], outcomes[4]], "min")
    worth = {"a": 0.1, "b": None, "d": 0.25}
    evaluated = [replace(one, held_out=worth.get(one.name)) for one in outcomes]
    assert best_of(evaluated, "min", held_out=True).name == "d"
    assert best_of([outcomes[0], outcomes[1]], "min", held_out=True).name == "a", "held-out photos without any object"
    table = as_table(evaluated, "loss", "segm/AP").splitlines()
    assert table[0] == "| trial | rate | loss | segm/AP | step | state |"
    assert [row.split(" | ")[3] for row in table[2:]] == ["0.1", "-", "-", "0.25", "-"]
    table = as_table(outcomes, "loss").splitlines()
    assert table[0] == "| trial | rate | loss | step | state |"
    assert table[2] == "| a | 0.1 | 2 | 4 | finished |"
    assert table[6] == "| e | 0.1 | - | 4 | failed |"


def test_a_data_set_that_is_not_there_is_refused_before_anything_is_started(tmp_path: Any) -> None:
    job = tune_job({RATE: {"grid": [0.1]}}).model_copy(update={"dataset": str(tmp_path / "nowhere")})
    with pytest.raises(UsageError, match="nowhere"):
        tune_stage(job, StageFolder(str(tmp_path), "run", "tune"))
    assert list(tmp_path.iterdir()) == []


def test_settings_name_a_training_s_metrics() -> None:
    """Which losses, `test_solo_task.py` holds against the task's own."""
    settings = TrainSettings.model_validate({"loop": {"steps": 1, "batch_size": 1}, "supervision": "masks"})
    assert settings.metrics[:3] == ("loss", "loss/category", "loss/dice")
