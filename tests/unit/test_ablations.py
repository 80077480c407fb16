"""Ablations: the rows' settings, refused at once where they are none; and what is said of their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from freesolo import ablations
from freesolo.ablations import Score, Spread, ablations_stage, as_table, differences, spread_of, summarize
from freesolo.comparison import Comparison
from freesolo.config import AblationJob, MethodJob
from freesolo.config_file import load_config
from freesolo.errors import UsageError
from freesolo.evaluation import Metrics, RegionMetrics
from freesolo.pipeline import Made
from freesolo.stages import StageFolder, what_is_made

ROOT = Path(__file__).parents[2]


def ablation_job(*overrides: str) -> AblationJob:
    return load_config(AblationJob, ROOT / "configs/ablations/smoke.yaml", overrides)


def test_a_row_is_the_base_but_for_what_it_sets() -> None:
    job = ablation_job("rows={scales: {extract.free_mask.query_scales: [1.0], train.losses.pairwise: 0.5}}")
    base, row = job.row_job({}, 7), job.row_job(job.rows["scales"], 7)
    assert isinstance(base, MethodJob)
    assert base.extract.free_mask.query_scales == (1.0, 0.5, 0.25)
    assert row.extract.free_mask.query_scales == (1.0,)
    assert row.train.losses == base.train.losses.model_copy(update={"pairwise": 0.5})
    assert row.pretrain == base.pretrain
    assert (base.rounds, base.held_out, base.dataset) == (job.rounds, job.held_out, job.dataset)


def test_a_row_without_effect_is_refused_where_it_has_none() -> None:
    """Of the base `pretrain` and `predict` are run, until it is given a backbone, and has no round."""
    pretrained = "rows={a: {pretrain.loop.steps: 5}}"
    ablation_job(pretrained)
    with pytest.raises(
        UsageError, match=r"rows.a: is the same as base \(pretrain.loop.steps: with an initial_backbone"
    ):
        ablation_job(pretrained, "initial_backbone=b.pt")
    labelled = "rows={a: {predict.short_side: 64}}"
    ablation_job(labelled)
    with pytest.raises(UsageError, match=r"rows.a: is the same as base \(predict.short_side: with rounds=0 nothing"):
        ablation_job(labelled, "rounds=0")


@pytest.mark.parametrize(
    ("base", "row", "reason"),
    [
        ("train.views.strong=false", "train.views.copy_paste: false", "with strong=false there is no view"),
        ("train.views.strong=false", "train.views.erasing_probabilities: []", "with strong=false there is no view"),
        ("train.views.strong=false", "train.views.hue: 0.0", "with strong=false there is no view"),
        ("train.supervision=free_masks", "train.losses.dice: 1.0", "with supervision=free_masks there is no such loss"),
        ("train.supervision=boxes", "train.losses.embedding: 1.0", "with supervision=boxes there is no such loss"),
        ("train.losses.pairwise=0.0", "train.losses.pairwise_warmup_steps: 7", "there is no pairwise loss"),
        ("rounds=1", "train.loop.log_every: 7", "how a training is looked at and kept changes no result"),
        ("rounds=1", "pretrain.probe.photos: 7", "it is only looked at"),
        ("rounds=1", "train.stream.prefetch_batches: 7", "what is made ready ahead changes no result"),
    ],
)
def test_a_row_of_settings_that_others_switch_off_is_refused(base: str, row: str, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"rows.a: is the same as base .*{reason}"):
        ablation_job(f"rows={{a: {{{row}}}}}", base)


def test_a_row_that_switches_on_what_it_sets_is_run() -> None:
    job = ablation_job("rows={a: {train.views.strong: true, train.views.copy_paste: true}}", "train.views.strong=false")
    base, row = job.row_job({}, 0).train.views, job.row_job(job.rows["a"], 0).train.views
    assert not base.strong
    assert (row.strong, row.copy_paste) == (True, True)


def test_what_is_forgiven_is_known_to_change_nothing() -> None:
    """Stages drop it wherever it is (`what_is_made`), so rows that set any of it would share all of their stages."""
    job = ablation_job("rows={}")
    forgiving = [
        section
        for section in ("pretrain.stream", "extract", "train.stream", "predict", "held_out")
        if what_is_made(job.row_job({f"{section}.max_bad_samples": 0.5}, 0)) == what_is_made(job.row_job({}, 0))
    ]
    assert len(forgiving) == str(job.model_dump()).count("max_bad_samples")
    for section in forgiving:
        with pytest.raises(UsageError, match=r"what is forgiven changes no result"):
            ablation_job(f"rows={{a: {{{section}.max_bad_samples: 0.5}}}}")


def test_a_seed_is_of_the_pre_training_and_of_the_training() -> None:
    job = ablation_job()
    one, other = job.row_job({}, 3), job.row_job({}, 4)
    assert (one.pretrain.loop.seed, one.train.loop.seed) == (3, 3)
    assert one != other
    assert one == job.row_job({}, 3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "rows={a: {train.loses.pairwise: 0.0}}",
            r"rows.a: train.loses.pairwise: no such setting; did you mean train.l",
        ),
        ("rows={a: {train.losses.pair: 0.0}}", r"no such setting; .*there are .*train.losses.pairwise, "),
        (
            "rows={a: {dataset: other}}",
            r"no such setting; there are rounds, pretrain, extract, train, predict, held_out",
        ),
        (
            "rows={a: {train.losses.pairwise: -1.0}}",
            r"rows.a: train.losses.pairwise=-1.0: .* greater than or equal to 0",
        ),
        ("rows={a: {rounds: none}}", r"rows.a: rounds='none': input should be a valid integer"),
        (
            "rows={a: {train.loop.seed: 1}}",
            r"rows.a: train.loop.seed: leave it out, each row is run with each of seeds",
        ),
        (
            "rows={a: {train: {losses: {pairwise: 0.0}}}}",
            r"rows.a: train: holds the seed, train.loop.seed; set what is inside of it",
        ),
        ("rows={a: {train.loop: 3}}", r"rows.a: train.loop: holds the seed, train.loop.seed; set what is inside of it"),
        ("rows={a: {pretrain.loop: {steps: 3}}}", r"rows.a: pretrain.loop: holds the seed, pretrain.loop.seed; set"),
        ("rows={a: {train.losses: 3}}", r"rows.a: train.losses=3: input should be"),
        ("rows={a: {extract.backbone: resnet34}}", r"rows.a: .*extract.backbone=resnet34, .*must be the same"),
        ("rows={a: {train.loop.batch_size: 5}, b: {}}", r"rows.b: is the same as base"),
        ("rows={a: {rounds: 0}, b: {rounds: 0}}", r"rows.b: is the same as a; set something that is run"),
        (
            "rows={a: {pretrain.stream.max_bad_samples: 0.5, train.stream.max_bad_samples: 0.5}}",
            r"rows.a: is the same as base \(pretrain.stream.max_bad_samples: what is forgiven changes no result; tr",
        ),
        ("rows={a: {train.initial_weights: x.pt}}", r"rows.a: is the same as base \(train.initial_weights: each train"),
        (
            "rows={a: {train.inference.min_score: 0.5}}",
            r"rows.a: is the same as base \(train.inference.min_score: it is only looked at",
        ),
        (
            "rows={a: {rounds: 0}, b: {rounds: 0, predict.short_side: 64}}",
            r"rows.b: is the same as a \(predict.short_side: with rounds=0 nothing is labelled anew\); set something",
        ),
        ("rows={base: {rounds: 0}}", r"rows: 2 of them would be base among the metrics; they must differ in that"),
        ("rows={no pairs: {rounds: 0}, no_pairs: {train.losses.pairwise: 0.0}}", r"rows: 2 of them would be no_pairs"),
        ("rows={a/b: {rounds: 0}}", r"rows.a/b"),
        ("seeds=[]", r"seeds"),
        ("seeds=[1, 1]", r"seeds=\[1, 1\]: each once"),
        ("evaluation_dataset=null", r"evaluation_dataset"),
        ("tracking.registered_model=freesolo", r"models of ablations are not registered"),
        ("initial_backbone=models:/densecl@candidate", r"an alias may move between two rows; give a version"),
        ("train.loop.accumulation_steps=3", r"train.loop.batch_size=4 must divide"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_once(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ablation_job(override)


@pytest.mark.parametrize("backbone", ["/data/me@work/b.pt", "s3://me@store/b.pt", "models:/densecl/1"])
def test_a_backbone_that_does_not_move_may_be_given(backbone: str) -> None:
    """An @ is an alias in the registry only."""
    assert ablation_job(f"initial_backbone={backbone}").initial_backbone == backbone


def test_a_stage_is_named_by_all_that_it_makes_and_by_nothing_else() -> None:
    folder, job = StageFolder("storage", "run", "ablations"), ablation_job()

    def name(*overrides: str, of: str = "solo") -> str:
        return folder.by_content(of, ablation_job("rows={}", *overrides)).stage

    stage = folder.by_content("solo", job)
    assert stage.run_url == folder.run_url
    assert stage.stage.startswith("solo-")
    assert len(stage.stage) == len("solo-") + 8
    assert name() == name("resources.workers=2", "tracking.uri=off", "train.stream.max_bad_samples=0.5")
    names = {name(), name("train.losses.pairwise=0.5"), name("train.loop.steps=5"), name("rounds=0"), name(of="other")}
    assert len(names) == 5


# Three seeds, of which one is lucky and one is not. The row is worse with each of them: by 5, 4 and 3 points.
BASE = [0.10, 0.20, 0.30]
ROW = [0.05, 0.16, 0.27]


def numbers(spread: Spread | None) -> tuple[float, float]:
    assert spread is not None
    assert spread.deviation is not None
    return spread.mean, spread.deviation


def test_mean_and_deviation() -> None:
    """Those from 0.2 are -0.1, 0 and 0.1: their squares sum to 0.02, over n - 1 = 2 it is 0.01, whose root is 0.1."""
    assert numbers(spread_of(BASE)) == pytest.approx((0.2, 0.1))
    assert numbers(spread_of([1.0, 3.0])) == pytest.approx((2.0, math.sqrt(2)))
    assert spread_of([0.25, 0.25]) == Spread(0.25, 0.0)
    assert spread_of([0.25]) == Spread(0.25, None)


@pytest.mark.parametrize("values", [[], [None], [0.1, None, 0.3]])
def test_what_is_not_known_has_no_mean(values: list[float | None]) -> None:
    assert spread_of(values) is None


def test_differences_are_seed_by_seed() -> None:
    """Levels are spread by 0.11 and 0.1; the differences -0.05, -0.04 and -0.03 by 0.01."""
    assert differences(ROW, BASE) == pytest.approx([-0.05, -0.04, -0.03])
    assert numbers(spread_of(differences(ROW, BASE))) == pytest.approx((-0.04, 0.01))
    assert differences([0.5, None, 0.5], [None, 0.5, 0.25]) == [None, None, 0.25]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        differences([0.1], BASE)


def scores(ap50: list[float], free_mask: list[float]) -> list[Score]:
    return [Score(one, one / 2, 1 - one, mask) for one, mask in zip(ap50, free_mask, strict=True)]


def test_the_table_in_percent() -> None:
    rows = {"base": scores(BASE, [0.01, 0.02, 0.03]), "without it": scores(ROW, [0.01, 0.02, 0.03])}
    summary = summarize(rows)
    assert summary["base"]["AP50 difference"] is None
    assert numbers(summary["without it"]["AR100"]) == pytest.approx((0.84, 0.11))
    header, rule, *lines = as_table(rows).splitlines()
    assert header.split(" | ")[1:3] == ["mask AP50", "difference in AP50"]
    assert header.count("|") == rule.count("|") == lines[0].count("|")
    assert lines == [
        "| base | 20.0 ± 10.0 | - | 10.0 ± 5.0 | 80.0 ± 10.0 | 2.0 ± 1.0 | 10.0, 20.0, 30.0 |",
        "| without it | 16.0 ± 11.0 | -4.0 ± 1.0 | 8.0 ± 5.5 | 84.0 ± 11.0 | 2.0 ± 1.0 | 5.0, 16.0, 27.0 |",
    ]


def test_one_seed_has_no_spread_and_what_was_not_measured_is_a_dash() -> None:
    rows: dict[str, Any] = {
        "base": scores([0.1], [0.0]),
        "row": scores([0.3], [0.0]),
        "none": [Score(*[None] * 4)],
    }
    assert as_table(rows).splitlines()[2:] == [
        "| base | 10.0 ± - | - | 5.0 ± - | 90.0 ± - | 0.0 ± - | 10.0 |",
        "| row | 30.0 ± - | +20.0 ± - | 15.0 ± - | 70.0 ± - | 0.0 ± - | 30.0 |",
        "| none | - | - | - | - | - | - |",
    ]


# AP50 of SOLO with each of the seeds, by the weight of the pairwise loss; Free Mask's is 0.1 with seed 0, 0.12 with 2.
AP50 = {(1.0, 2): 0.50, (1.0, 0): 0.30, (0.0, 2): 0.44, (0.0, 0): 0.22}


def finds_its_name(dataset: str, label_sets: Mapping[str, str], *, over_shards: object) -> Comparison:
    """An evaluation whose AP50 is what a label set is called."""
    nothing = RegionMetrics(**dict.fromkeys((field.name for field in fields(RegionMetrics)), 0.0))
    rows = {
        url: Metrics(replace(nothing, ap50=float(url.split(" ")[-1]), ap=0.5), nothing, 0.0, 1, 1, 1)
        for url in label_sets
    }
    return Comparison("digest", rows)


def made_of(job: MethodJob, folder: StageFolder, _: object) -> Made:
    """A method that makes label sets whose names say how good they are."""
    seed, pairwise = job.train.loop.seed, job.train.losses.pairwise
    assert job.pretrain.loop.seed == seed
    labels = {"Free Mask": f"seed {seed}: {0.1 + seed / 100}", "SOLO": f"{pairwise}, {seed}: {AP50[pairwise, seed]}"}
    return Made(trained={"SOLO": folder.sibling(f"solo-{pairwise}-{seed}")}, held_out=labels)


def test_rows_are_compared_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two values the deviation is their distance by the root of 2.

    The base: 0.5 and 0.3, of mean 0.4 and deviation 0.2 / 1.414 = 0.141. The row: 0.44 and 0.22, of mean 0.33 and
    deviation 0.22 / 1.414 = 0.156. Its differences from the base with the same seed: -0.06 and -0.08, of mean -0.07 and
    deviation 0.02 / 1.414 = 0.014. (From that with the other seed they would be 0.14 and -0.28, of deviation 0.297.)
    """
    for name, stand_in in {
        "run_method": made_of,
        "compare": finds_its_name,
        "check_data": lambda _: None,
        "tell_dataset": lambda *_: None,
    }.items():
        monkeypatch.setattr(ablations, name, stand_in)
    job = ablation_job("rows={no pairs: {train.losses.pairwise: 0.0}}", "seeds=[2, 0]", "tracking.uri=off")
    result = ablations_stage(job, StageFolder(str(tmp_path), "run", "ablations"))
    assert result.counts == {"rows": 2, "seeds": 2, "trainings": 4}
    expected = {
        "base/AP50": 0.4,
        "base/AP50_deviation": 0.2 / math.sqrt(2),
        "no_pairs/AP50": 0.33,
        "no_pairs/AP50_deviation": 0.22 / math.sqrt(2),
        "no_pairs/AP50_difference": -0.07,
        "no_pairs/AP50_difference_deviation": 0.02 / math.sqrt(2),
        "base/Free_Mask_AP50": 0.11,
        "no_pairs/Free_Mask_AP50_deviation": 0.02 / math.sqrt(2),
    }
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.metrics["base/AP50_difference"] is None
    page = (tmp_path / "run" / "ablations" / "ablations.md").read_text()
    assert "over the seeds 2, 0." in page
    assert "| base | 40.0 ± 14.1 | - | 50.0 ± 0.0 | 0.0 ± 0.0 | 11.0 ± 1.4 | 50.0, 30.0 |" in page
    assert "| no pairs | 33.0 ± 15.6 | -7.0 ± 1.4 | 50.0 ± 0.0 | 0.0 ± 0.0 | 11.0 ± 1.4 | 44.0, 22.0 |" in page
