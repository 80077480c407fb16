"""Settings: strict, overridable, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from freesolo.config import EvaluateJob, PipelineJob, PretrainJob, TrainJob
from freesolo.config_file import dump_config, load_config, parse_config
from freesolo.errors import UsageError
from freesolo.settings import LoopSettings

MINIMAL = {"dataset": "photos", "train": {"loop": {"steps": 10, "batch_size": 4}}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_yaml_and_overrides_come_together(config: Path) -> None:
    job = load_config(TrainJob, config, ["train.loop.steps=20", "resources.workers=2", "labels=free"])
    assert (job.train.loop.steps, job.train.loop.batch_size, job.resources.workers) == (20, 4, 2)
    assert (job.labels, job.train.losses.mean_projection) == (str(Path("free").absolute()), 0.1)


def test_a_section_given_in_part_keeps_the_rest_of_its_default() -> None:
    """The default of the place, not of the section's class: the two differ where a section is used twice."""
    loop = {"steps": 10, "batch_size": 4}
    raw = {
        "dataset": "photos",
        "pretrain": {"loop": loop, "model": {"queue_length": 64}, "optimizer": {"warmup_steps": 5}},
        "train": {"loop": loop},
        "predict": {"inference": {"nms_sigma": 1.0}},
        "held_out": {"short_side": 192},
    }
    job = parse_config(PipelineJob, raw, source="test")
    optimizer = job.pretrain.optimizer
    assert (optimizer.warmup_steps, optimizer.learning_rate, optimizer.schedule) == (5, 0.3, "cosine")
    pseudo, held_out = job.predict, job.held_out
    assert (pseudo.inference.nms_sigma, pseudo.inference.min_score, pseudo.inference.max_instances) == (1.0, 0.3, 20)
    assert (held_out.short_side, held_out.max_width, held_out.inference.min_score) == (192, 1.0, 0.05)


def test_values_are_yaml(config: Path) -> None:
    overrides = ["train.views.short_sides=[96, 128]", "labels=null", "train.freeze_batch_norm=true"]
    job = load_config(TrainJob, config, overrides)
    assert (job.train.views.short_sides, job.labels, job.train.freeze_batch_norm) == ((96, 128), None, True)


def test_relative_paths_are_made_absolute_and_urls_and_names_are_left(config: Path, tmp_path: Path) -> None:
    """Workers run in folders of their own."""
    for labels in ("s3://bucket/labels", "memory://labels", "/data/labels"):
        assert load_config(TrainJob, config, [f"labels={labels}"]).labels == labels
    for weights in ("models:/solo@champion", "densecl-r50-imagenet", "https://example.org/w.pth"):
        job = load_config(TrainJob, config, [f"train.initial_weights={weights}"])
        assert job.train.initial_weights == weights
    assert load_config(TrainJob, config).dataset == str(Path("photos").absolute())


def test_a_dumped_configuration_is_read_back_equal(config: Path, tmp_path: Path) -> None:
    job = load_config(TrainJob, config, ["train.optimizer.learning_rate=0.5"])
    (tmp_path / "again.yaml").write_text(dump_config(job))
    assert load_config(TrainJob, tmp_path / "again.yaml") == job


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.loop.stepz=3", r"train.loop.stepz: no such setting; did you mean steps\?"),
        ("train.optimizer.learning_rate=1e-4", r"learning_rate='1e-4'.*write 1.0e-4"),
        ("train.loop.batch_size=0", r"train.loop.batch_size=0: .*greater than 0"),
        ("train.loop.steps=3.5", r"train.loop.steps=3.5"),
        ("train.supervision=magic", r"train.supervision='magic': .*free_masks"),
        ("train.model.strides=[8, 16]", "must each have 5 entries"),
        ("train.loop", "write section.field=value"),
        ("dataset.name=x", "dataset is a value, not a section"),
        ("resources=3", r"resources=3"),
        ("train.loop.steps=[", r"'train.loop.steps=\['.* not valid YAML"),
        ("train.model.head.kernel_channels=48", r"kernel_channels=48 is not divisible by 32"),
    ],
)
def test_what_is_wrong_is_named(config: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(TrainJob, config, [override])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(UsageError, match=r"dataset: missing; give it .*; train: missing"):
        load_config(TrainJob, path)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "must be a mapping"), ("a: [", "not valid YAML")])
def test_files_that_are_not_settings(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(TrainJob, path)
    with pytest.raises(UsageError, match="no such file"):
        load_config(TrainJob, tmp_path / "nowhere.yaml")


def test_a_queue_that_a_batch_does_not_divide_is_refused() -> None:
    raw = {"dataset": "d", "pretrain": {"model": {"queue_length": 100}, "loop": {"steps": 1, "batch_size": 32}}}
    with pytest.raises(UsageError, match=r"queue_length=100 is not divisible by loop.batch_size=32"):
        parse_config(PretrainJob, raw, source="here")


def test_a_batch_that_does_not_divide_by_workers_is_refused() -> None:
    raw = {**MINIMAL, "resources": {"workers": 3}}
    with pytest.raises(UsageError, match=r"batch_size=4 .* 3 workers"):
        parse_config(TrainJob, raw, source="here")
    raw = {"dataset": "d", "train": {"loop": {"steps": 1, "batch_size": 4, "accumulation_steps": 4}}}
    with pytest.raises(UsageError, match=r"batch_size=4 .* 2 workers .* 4 accumulation_steps"):
        parse_config(TrainJob, {**raw, "resources": {"workers": 2}}, source="here")


def test_label_sets_have_metrics_of_their_own() -> None:
    raw = {"dataset": "d", "labels": {"Free Mask": "a", "Free_Mask": "b", "SOLO": "c"}}
    with pytest.raises(UsageError, match=r"labels: 2 of them would be Free_Mask among the metrics"):
        parse_config(EvaluateJob, raw, source="here")


@pytest.mark.parametrize("name", ["SOLO (a)", "a/b", "../a", "", "x" * 51])
def test_names_of_label_sets_are_plain(name: str) -> None:
    with pytest.raises(UsageError, match="labels"):
        parse_config(EvaluateJob, {"dataset": "d", "labels": {name: "a"}}, source="here")


def test_a_label_set_is_not_called_as_the_data_sets_own_are() -> None:
    with pytest.raises(UsageError, match="labels: Annotations is what the data set's own are called"):
        parse_config(EvaluateJob, {"dataset": "d", "labels": {"Annotations": "a"}}, source="here")


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"milestones": [5]}, "schedule=constant with milestones=.5.: `step` needs them"),
        ({"schedule": "cosine", "milestones": [5]}, "schedule=cosine with milestones"),
        ({"schedule": "step"}, "schedule=step with milestones=.."),
        ({"schedule": "step", "milestones": [7, 5]}, "must ascend"),
        ({"schedule": "step", "milestones": [0]}, "greater than 0"),
    ],
)
def test_milestones_are_of_the_schedule_that_has_them(optimizer: dict[str, Any], message: str) -> None:
    raw = {
        "dataset": "d",
        "train": {"loop": {"steps": 3, "batch_size": 4}, "optimizer": {"learning_rate": 0.1, **optimizer}},
    }
    with pytest.raises(UsageError, match=message):
        parse_config(TrainJob, raw, source="here")


def test_photos_are_padded_to_what_the_network_takes() -> None:
    raw = {"dataset": "d", "train": {"loop": {"steps": 3, "batch_size": 4}, "views": {"size_divisor": 16}}}
    with pytest.raises(UsageError, match=r"train\.views\.size_divisor=16: input should be a multiple of 32"):
        parse_config(TrainJob, raw, source="here")


def test_a_pipeline_checks_each_of_its_stages() -> None:
    raw = {
        "dataset": "d",
        "resources": {"workers": 2},
        "pretrain": {"model": {"queue_length": 64}, "loop": {"steps": 1, "batch_size": 32}},
        "train": {"loop": {"steps": 1, "batch_size": 3}},
    }
    with pytest.raises(UsageError, match=r"train.loop.batch_size=3 .* 2 workers"):
        parse_config(PipelineJob, raw, source="here")


def test_a_pipeline_refuses_stages_that_cannot_use_one_anothers_models() -> None:
    raw = {
        "dataset": "d",
        "pretrain": {"model": {"backbone": "resnet18", "queue_length": 64}, "loop": {"steps": 1, "batch_size": 32}},
        "extract": {"backbone": "resnet18"},
        "train": {"model": {"backbone": "resnet18"}, "loop": {"steps": 1, "batch_size": 4}},
    }
    parse_config(PipelineJob, raw, source="here")
    with pytest.raises(UsageError, match=r"pretrain.model.backbone=resnet18, extract.backbone=resnet50, .* the same"):
        parse_config(PipelineJob, raw | {"extract": {}}, source="here")
    narrow = {"backbone": "resnet18", "free_mask": {"embedding_channels": 16}}
    with pytest.raises(
        UsageError, match=r"embedding_channels=16, train.model.embedding_channels=128: must be the same"
    ):
        parse_config(PipelineJob, raw | {"extract": narrow}, source="here")
    many = {"model": {"backbone": "resnet18", "num_categories": 80}, "loop": {"steps": 1, "batch_size": 4}}
    with pytest.raises(
        UsageError, match=r"train.model.num_categories=80: Free Masks are of objects as such; set it to 1"
    ):
        parse_config(PipelineJob, raw | {"train": many}, source="here")
    given = {"initial_backbone": "models:/b@champion", "pretrain": {"loop": {"steps": 1, "batch_size": 32}}}
    assert parse_config(PipelineJob, raw | given, source="here").pretrain.model.backbone == "resnet50"


def test_what_yaml_makes_of_words(config: Path) -> None:
    """`off` is false to YAML, and 2026-01-31 a date."""
    job = load_config(TrainJob, config, ["tracking.uri=off", "dataset=2026-01-31"])
    assert job.tracking.uri == "off"
    assert job.dataset == str(Path("2026-01-31").absolute())


def test_every_number_of_elastic_workers_must_divide_the_batch(config: Path) -> None:
    job = load_config(TrainJob, config, ["resources.workers=[1, 4]", "train.loop.batch_size=12"])
    assert (job.resources.min_workers, job.resources.max_workers) == (1, 4)
    message = r"train.loop.batch_size=8 must divide by the 3 workers .*as by every number of workers from 2 to that"
    with pytest.raises(UsageError, match=message):
        load_config(TrainJob, config, ["resources.workers=[2, 4]", "train.loop.batch_size=8"])


@pytest.mark.parametrize(
    ("workers", "passes"), [(8, 2), (6, 4), (4, 4), (3, 8), (2, 8), (1, 16)]
)  # of a batch of 48: 3 rows a pass with 8 workers and 2 passes
def test_fewer_workers_make_more_passes_of_no_more_rows(workers: int, passes: int) -> None:
    loop = LoopSettings(steps=1, batch_size=48, accumulation_steps=2)
    assert loop.accumulation_with(workers, 8) == passes
    assert 48 % (workers * passes) == 0
    assert 48 // (workers * passes) <= 3


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_config(TrainJob, path, overrides)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases (*name) are not read in a configuration"),
        ("dataset: a\ndataset: b\n", "a setting is there twice"),
        ("train: {loop: {steps: 1, steps: 2}}\n", "a setting is there twice"),
        ("a: " + "[" * 2000, "nested more than 32 deep"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("train: {loop: {steps: " + "1" * 5000 + "}}\n", "Exceeds the limit"),
        ("a: 2001-99-99\n", "month must be in 1..12"),
        ("2001-01-01: a\n", "the names of settings are words"),
        ("a: \x01\n", "not valid YAML"),
        ("- a\n", "must be a mapping of settings"),
        ("dataset: d\ntrain: {loop: {steps: 1, batch_size: 1}, losses: {dice: .nan}}\n", "train.losses.dice=nan"),
        ("dataset: d\ntrain: {loop: {steps: 1, batch_size: 1}, losses: {dice: .inf}}\n", "train.losses.dice=inf"),
        ("dataset: d\ntrain: {loop: {steps: 1, batch_size: 1}}\nbounds: {max_pixels: 1e12}\n", "bounds.max_pixels"),
        (f"dataset: [{'x' * 3000}]\n", "dataset"),
    ],
)
def test_a_configuration_of_a_bad_actor_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    assert complaint in refused(tmp_path, text)


@pytest.mark.parametrize("value", ["[" * 100, "*a", "&a x", "2001-99-99", "1" * 5000])
def test_so_is_an_override(tmp_path: Path, value: str) -> None:
    text = "dataset: d\ntrain: {loop: {steps: 1, batch_size: 1}}\n"
    assert "train.loop.steps" in refused(tmp_path, text, f"train.loop.steps={value}")


def test_bounds_have_one_place_for_every_job(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("dataset: d\ntrain: {loop: {steps: 1, batch_size: 1}}\n", encoding="utf-8")
    assert load_config(TrainJob, path).bounds.max_pixels == 128_000_000
    job = load_config(TrainJob, path, ["bounds.max_pixels=200000000", "bounds.max_sample_bytes=1000"])
    assert (job.bounds.max_pixels, job.bounds.max_sample_bytes) == (200_000_000, 1000)
