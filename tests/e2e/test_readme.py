"""Each command that README shows is run: the stages here, at a tiny size; the others by the tests named here."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from freesolo import cli
from freesolo.data.files import read_bytes
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest
from tests.marks import IGNORE_WARNINGS_OF_RAY_TRAIN

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.timeout(1200),
    *IGNORE_WARNINGS_OF_RAY_TRAIN,
]

# How each other command begins, and where it is run.
RUN_ELSEWHERE = {
    "make demo": "tests/e2e/test_pipeline.py",
    "make test": ".ci/run",
    "make ablations": "tests/integration/test_ablations.py",
    "make image": "tests/image/test_built_image.py",
    "freesolo pack": "Makefile",
    "python jobs/run_pipeline.py": "tests/e2e/test_pipeline.py",
    "python jobs/run_ablations.py": "tests/integration/test_ablations.py",
    "python jobs/tune_solo.py": "tests/integration/test_tuning_interrupted.py",
    "freesolo predict": "tests/e2e/test_pipeline.py",
    "freesolo inspect": "tests/e2e/test_pipeline.py",
    "freesolo export coco": "tests/e2e/test_pipeline.py",
    "freesolo export program": "tests/integration/test_registry.py",
    "freesolo export weights": "tests/unit/test_layouts.py",
    "freesolo weights pull": "tests/unit/test_published.py",
    "freesolo weights import": "tests/unit/test_layouts.py",
    "freesolo deliver": "tests/unit/test_tracking.py",
    "freesolo demo-data": "Makefile",
    # Without a cluster they can't be run: what they name is looked up.
    **dict.fromkeys(("kubectl", "helm", "kind", "docker build", "export"), "tests/kubernetes/test_documents.py"),
}

# What makes a stage small enough: R50s as in README, but on thumbnails, for a step, on a CPU.
ON_A_CPU = ("resources.workers=1", "resources.gpus_per_worker=0", "resources.cpus_per_worker=1")
TINY = {
    "pretrain_densecl": (
        *("pretrain.views.size=32", "pretrain.model.hidden_channels=32", "pretrain.model.queue_length=8"),
        *("pretrain.loop.steps=1", "pretrain.loop.batch_size=4", "pretrain.optimizer.learning_rate=0.0001"),
    ),
    # An untrained network's masks are noise: all of them are taken.
    "extract_free_masks": (
        *("extract.free_mask.short_side=64", "extract.free_mask.feature_level=4", "extract.free_mask.max_width=1"),
        *("extract.free_mask.min_maskness=0", "extract.free_mask.top_border=0"),
    ),
    "train_solo": (
        *("train.views.short_sides=[64]", "train.model.head.tower_channels=32", "train.model.fpn_channels=32"),
        *(
            "train.model.head.mask_tower_channels=32",
            "train.model.head.kernel_channels=32",
            "train.model.head.tower_convs=1",
        ),
        *("train.loop.steps=1", "train.loop.batch_size=2", "train.loop.overlay_every=0"),
    ),
    "predict": ("predict.short_side=64", "predict.inference.min_category_score=0", "predict.inference.min_score=0"),
    "evaluate": (),
}
# From one start with half of the labels; tests/integration/test_fine_tuning.py has several.
TINY["fine_tune"] = (
    *(*TINY["train_solo"], "train.model.num_categories=1", "min_steps=1"),
    *("starts={FreeSOLO: models:/freesolo-r50@candidate}", "fractions=[0.5]"),
    *("held_out.short_side=64", "held_out.inference.min_category_score=0", "held_out.inference.min_score=0"),
)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def stage_commands() -> dict[str, list[str]]:
    """The arguments of each stage's job, in README's order."""
    words = [command.split(maxsplit=2) for command in readme_commands() if command.startswith("python jobs/")]
    jobs = {Path(script).stem: shlex.split(arguments) for _, script, arguments in words}
    return {job: arguments for job, arguments in jobs.items() if f"python jobs/{job}.py" not in RUN_ELSEWHERE}


def test_each_command_is_run_somewhere() -> None:
    stages = tuple(f"python jobs/{stage}.py" for stage in TINY)
    for command in readme_commands():
        assert command.startswith((*stages, *RUN_ELSEWHERE)), f"no test runs README's `{command}`"
    for start, test in RUN_ELSEWHERE.items():
        last_word = start.split()[-1].removeprefix("jobs/")
        assert last_word in (ROOT / test).read_text(), f"{test} does not run `{start}`"


def test_who_types_all_of_it_starts_no_run_again_with_another_job() -> None:
    """Stages of one run may have one name for it; a job that makes several stages has its run to itself."""
    jobs: dict[str, set[str]] = {}
    for command in readme_commands():
        if (words := shlex.split(command))[:1] == ["python"] and "--run-name" in words:
            jobs.setdefault(words[words.index("--run-name") + 1], set()).add(Path(words[1]).stem)
    stages = {"pretrain_densecl", "extract_free_masks", "train_solo", "predict", "evaluate"}
    assert jobs["r50"] == stages
    for name, those in jobs.items():
        assert those <= stages or len(those) == 1, name


def test_what_readme_says_that_jobs_say_they_say() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "freesolo").rglob("*.py")))
    source = re.sub(r'"\n\s+f?"', "", source)  # a message may go over several lines
    section = (ROOT / "README.md").read_text().split("## When something breaks")[1].split("\n## ")[0]
    said = re.findall(r"^\| `([^`]*)` \|", section, re.MULTILINE)
    assert len(said) > 10
    for message in said:
        for part in re.split(r"\.\.\.|\(\.\.\.\)", message):
            assert part.strip(" ();") in source, f"nothing in freesolo says `{message}`"


def in_the_bucket(bucket: str, argument: str) -> str:
    """README's argument with a bucket's URL for each of its folders: all that a cluster changes."""
    return re.sub(r"(?<![\w/])(data/|runs\b)", rf"{bucket}/\1", argument)


def run_job(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Run a job in this process, on the tests' cluster; its result."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    output, errors = capsys.readouterr()
    assert ended.value.code == 0, errors[-4000:]
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


@pytest.mark.trainings
def test_the_stages_one_after_the_other_on_object_storage(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each takes what the one before it registered or wrote, as README says, and nothing else."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    compose_scenes(f"{bucket}/photos", 4, size=64, seed=0)
    photos, dataset = f"{bucket}/photos/images", f"{bucket}/data/photos"
    arguments = ["--config", "configs/pack/photos.yaml", "--run-name", "pack", "--storage", f"{bucket}/runs"]
    packed = run_job("pack_shards", [*arguments, f"photos={photos}", f"dataset={dataset}"], monkeypatch, capsys)
    assert packed["counts"] == {"images": 4, "shards": 1, "skipped": 0}
    here = pack(photos, f"{bucket}/data/packed-here")
    assert read_dataset_manifest(dataset).digest == here.digest, "the job's shards are not those of `freesolo pack`"
    for name, seed in (("held-out", 1), ("labelled", 2)):
        pack(compose_scenes(f"{bucket}/{name}", 2, size=64, seed=seed), f"{bucket}/data/{name}")

    results = {}
    assert list(stage_commands()) == list(TINY)
    for stage, readme in stage_commands().items():
        arguments = [in_the_bucket(bucket, argument) for argument in readme]
        settings = (*ON_A_CPU, *TINY[stage]) if stage != "evaluate" else ()
        results[stage] = run_job(stage, [*arguments, *settings], monkeypatch, capsys)
    assert results["pretrain_densecl"]["outputs"]["registered"] == "models:/densecl-r50/1"
    assert results["extract_free_masks"]["counts"]["images"] == 4
    assert results["train_solo"]["outputs"]["registered"] == "models:/freesolo-r50/1"
    assert results["predict"]["counts"]["images"] == 2
    assert results["evaluate"]["metrics"]["SOLO/images"] == 2
    report = read_bytes(results["evaluate"]["outputs"]["report"])
    assert report.startswith(b"<!doctype html>")
    assert results["fine_tune"]["metrics"]["FreeSOLO_at_50_percent/images"] == 2

    assert cli.main(["deliver", f"{bucket}/runs/r50"]) == 0
    delivered = capsys.readouterr().out.splitlines()
    assert len(delivered) == len(TINY) - 1  # all but fine-tuning, which is a run of its own
    assert all("records delivered" in line and ": all " in line for line in delivered), delivered
