"""What a person gets wrong, through the commands that they type: one line that names it and the fix, an exit code.

Which words are said where is also the business of the modules' own tests; here each case goes the whole way, and is
refused before Ray is started and before anything is written.
"""

from __future__ import annotations

import json
import logging
import runpy
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from s3fs import S3FileSystem

from freesolo import cli
from freesolo.config import TrainJob
from freesolo.config_file import load_config
from freesolo.data import retry
from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import LabelPlan, begin_label_set, finish_label_set, write_label_file
from freesolo.data.pack import pack
from freesolo.data.scenes import compose_scenes
from freesolo.data.shards import read_dataset_manifest, read_shard
from freesolo.errors import JobError
from freesolo.models.model_file import save_model
from freesolo.models.resnet import build_resnet
from freesolo.registry.versions import register_backbone
from freesolo.settings import TrackingSettings
from freesolo.solo.model import Segmenter
from freesolo.stages import StageFolder, StageResult, run_stage, what_is_made
from freesolo.tracking.server import resolve_server
from tests.small import small_solo

ROOT = Path(__file__).parents[2]
MODEL = small_solo()


@dataclass(frozen=True)
class Case:
    """A command that is refused.

    Attributes:
        command: Of a terminal; `{folder}` is where the fixture keeps everything, `{port}` one where nobody listens.
        code: 2 for wrong use, 1 for failure.
        words: In the line, in this order: the thing, what is wrong with it, what to do.
        credentials: Whether the environment has some for a store.
        begun: Whether the work had begun before, so that a line says how far it came.
    """

    command: str
    code: int
    words: tuple[str, ...]
    credentials: bool = True
    begun: bool = False


def job(name: str, config: str, *settings: str) -> str:
    return f"jobs/{name}.py --config {config} --run-name new --storage {{folder}}/runs {' '.join(settings)}"


def extract(*settings: str) -> str:
    return job("extract_free_masks", "configs/extract/free_masks_r50.yaml", "labels={folder}/new", *settings)


def train(*settings: str) -> str:
    return job("train_solo", "{folder}/train.yaml", *settings)


def pretrain(*settings: str) -> str:
    return job("pretrain_densecl", "{folder}/pretrain.yaml", *settings)


def predict(*settings: str) -> str:
    return job("predict", "configs/predict/solo_r50.yaml", "labels={folder}/new", *settings)


def evaluate(*settings: str) -> str:
    return job("evaluate", "{folder}/evaluate.yaml", *settings)


def pipeline(*settings: str) -> str:
    return job("run_pipeline", "configs/pipeline/smoke.yaml", *settings)


def predict_photo(model: str, photo: str = "{folder}/photo.jpg", *options: str) -> str:
    return f"freesolo predict {model} {photo} --out {{folder}}/new.png --storage {{folder}}/runs {' '.join(options)}"


CASES = {
    # Folders and stores.
    "store that is away": Case(
        "freesolo inspect http://127.0.0.1:{port}/data",
        1,
        ("http://127.0.0.1:{port}/data", "cannot be reached", "check"),
    ),
    "bucket that is away": Case(
        extract("dataset=s3://away/photos"), 1, ("s3://away/photos", "cannot be reached", "AWS_ENDPOINT_URL")
    ),
    "no credentials": Case(
        "freesolo inspect s3://nobody/photos",
        2,
        ("s3://nobody/photos", "no credentials", "set AWS_ACCESS_KEY_ID"),
        credentials=False,
    ),
    "no credentials, job": Case(
        extract("dataset=s3://nobody/photos"),
        2,
        ("s3://nobody/photos", "no credentials", "set AWS_ACCESS_KEY_ID"),
        credentials=False,
    ),
    "unknown protocol": Case(
        "freesolo inspect gopher://photos", 2, ("gopher://photos", "not known", "give a path, file://... or s3://")
    ),
    "folder that is not there": Case(
        "freesolo pack {folder}/nowhere {folder}/new", 2, ("{folder}/nowhere", "no such folder", "check the path")
    ),
    "empty folder": Case(
        "freesolo pack {folder}/empty {folder}/new", 2, ("{folder}/empty", "no photos there", "looked for .jpg")
    ),
    "empty folder, job": Case(
        job("pack_shards", "configs/pack/photos.yaml", "photos={folder}/empty", "dataset={folder}/new"),
        2,
        ("{folder}/empty", "no photos there", "looked for .jpg"),
    ),
    "no readable photo": Case(
        "freesolo pack {folder}/unreadable {folder}/new --max-bad-samples 1",
        2,
        ("{folder}/unreadable", "none of 2 photos can be read", "a.jpg: empty file"),
        begun=True,
    ),
    "too many unreadable photos": Case(
        "freesolo pack {folder}/unreadable {folder}/new",
        1,
        ("{folder}/unreadable", "2 of 2 photos cannot be used", "max_bad_samples", "a.jpg"),
        begun=True,
    ),
    "data set that is there already": Case(
        "freesolo pack {folder}/photos/images {folder}/data", 2, ("{folder}/data", "already", "give another URL")
    ),
    "data set that is not there": Case(
        pretrain("dataset={folder}/nowhere"), 2, ("{folder}/nowhere", "no data set there", "jobs/pack_shards.py")
    ),
    # Manifests.
    "data set of a newer format": Case(
        extract("dataset={folder}/newer-data"), 2, ("newer-data/manifest.json", "newer freesolo", "upgrade this one")
    ),
    "label set of a newer format": Case(
        train("dataset={folder}/data", "labels={folder}/newer-labels"),
        2,
        ("newer-labels/manifest.json", "newer freesolo", "upgrade this one"),
    ),
    "label set of another data set": Case(
        train("dataset={folder}/other", "labels={folder}/labels"),
        2,
        ("{folder}/labels", "made for another data set ({folder}/data", "give that one"),
    ),
    "label set of another data set, evaluation": Case(
        evaluate("dataset={folder}/other"),
        2,
        ("{folder}/labels", "made for another data set ({folder}/data", "give that one"),
    ),
    "label set made otherwise": Case(
        predict("dataset={folder}/data", "weights={folder}/segmenter.pt", "labels={folder}/labels"),
        2,
        ("{folder}/labels", "made otherwise", "choose another URL"),
    ),
    "label set without an instance": Case(
        train("dataset={folder}/data", "labels={folder}/labels"), 2, ("{folder}/labels", "no instance at all")
    ),
    "training without labels": Case(
        train("dataset={folder}/plain"), 2, ("{folder}/plain", "no annotations of its own", "URL of a label set")
    ),
    "evaluation without annotations": Case(
        evaluate("dataset={folder}/plain"), 2, ("{folder}/plain", "no annotations", "pack it from a COCO JSON")
    ),
    "pipeline's evaluation without annotations": Case(
        pipeline("dataset={folder}/data", "evaluation_dataset={folder}/plain", "pretrain.loop.batch_size=4"),
        2,
        ("{folder}/plain", "no annotations", "pack it from a COCO JSON"),
    ),
    "inspect of nothing of ours": Case(
        "freesolo inspect {folder}/empty", 2, ("{folder}/empty", "neither a data set, nor a label set, nor a run")
    ),
    "export of nothing of ours": Case(
        "freesolo export coco {folder}/empty {folder}/new.json", 2, ("{folder}/empty", "no data set", "label set")
    ),
    # Weights.
    "initial weights of another depth": Case(
        train("dataset={folder}/data", "train.initial_weights={folder}/backbone.pt", "train.model.backbone=resnet34"),
        2,
        ("{folder}/backbone.pt", "ResNet-18 checkpoint", "set backbone to resnet18"),
    ),
    "initial segmenter of another architecture": Case(
        train("dataset={folder}/data", "train.initial_weights={folder}/segmenter.pt", "train.model.head.tower_convs=2"),
        2,
        ("{folder}/segmenter.pt", "another architecture than train.model", "head."),
    ),
    "backbone weights of another depth": Case(
        pretrain("dataset={folder}/data", "pretrain.model.backbone_weights={folder}/backbone.pt"),
        2,
        ("{folder}/backbone.pt", "ResNet-18 checkpoint", "set backbone to resnet18"),
    ),
    "extract weights of another depth": Case(
        extract("dataset={folder}/data", "weights={folder}/backbone.pt"),
        2,
        ("{folder}/backbone.pt", "ResNet-18 checkpoint", "set backbone to resnet18"),
    ),
    "pipeline's weights of another depth": Case(
        pipeline("dataset={folder}/data", "initial_backbone={folder}/backbone.pt", "extract.backbone=resnet50"),
        2,
        ("extract.backbone", "resnet50", "resnet18"),
    ),
    "predict job with a backbone": Case(
        predict("dataset={folder}/data", "weights={folder}/backbone.pt"),
        2,
        ("{folder}/backbone.pt", "holds a backbone", "a segmenter is needed"),
    ),
    "predict with a backbone": Case(
        predict_photo("{folder}/backbone.pt"), 2, ("{folder}/backbone.pt", "holds a backbone", "a segmenter is needed")
    ),
    "run begun with another architecture": Case(
        train("dataset={folder}/data", "train.model.backbone=resnet34").replace("--run-name new", "--run-name begun"),
        2,
        ("{folder}/runs/begun/solo", "train.model.backbone: 'resnet18', now 'resnet34'", "another --run-name"),
    ),
    "published weights of another name": Case(
        "freesolo weights pull densecl-r50-imagenett --to {folder}/new",
        2,
        ("densecl-r50-imagenett", "densecl-r50-imagenet"),
    ),
    # The registry.
    "unknown alias": Case(
        predict_photo("models:/backbone@nope"), 2, ("models:/backbone@nope", "no such alias", "@candidate")
    ),
    "unknown model": Case(
        predict_photo("models:/unknown@champion"), 2, ("models:/unknown", "no such model is registered", "backbone")
    ),
    "unknown alias, job": Case(
        extract("dataset={folder}/data", "weights=models:/backbone@nope"),
        2,
        ("models:/backbone@nope", "no such alias", "@candidate"),
    ),
    "storage without a registry": Case(
        predict_photo("models:/backbone@candidate", "{folder}/photo.jpg", "--storage {folder}/empty"),
        2,
        ("models:/backbone@candidate", "{folder}/empty/mlflow.db", "give the storage"),
    ),
    "registry with tracking off": Case(
        predict_photo("models:/backbone@candidate", "{folder}/photo.jpg", "--tracking-uri off"),
        2,
        ("models:/backbone@candidate", "tracking.uri=off", "give a file"),
    ),
    "registry with tracking off, job": Case(
        extract("dataset={folder}/data", "weights=models:/backbone@candidate", "tracking.uri=off"),
        2,
        ("models:/backbone@candidate", "tracking.uri=off", "give a file"),
    ),
    "registry that is away": Case(
        predict_photo("models:/backbone@candidate", "{folder}/photo.jpg", "--tracking-uri http://127.0.0.1:{port}"),
        1,
        ("models:/backbone@candidate", "http://127.0.0.1:{port} does not answer", "run the same again"),
    ),
    # Photos.
    "photo that is not there": Case(
        predict_photo("{folder}/segmenter.pt", "{folder}/nowhere.jpg"),
        2,
        ("{folder}/nowhere.jpg", "no such file", "check"),
    ),
    "photo that is none": Case(
        predict_photo("{folder}/segmenter.pt", "{folder}/train.yaml"), 1, ("{folder}/train.yaml", "not a photo")
    ),
    # Settings.
    "configuration that is not there": Case(
        job("predict", "{folder}/nowhere.yaml"), 2, ("--config {folder}/nowhere.yaml", "no such file")
    ),
    "typo": Case(
        train("train.loop.stepz=3"), 2, ("train.yaml", "train.loop.stepz", "no such setting", "did you mean steps?")
    ),
    "unknown head": Case(
        train("train.model.head.kind=yolo"), 2, ("train.model.head.kind='yolo'", "'solo', 'decoupled' or 'solov2'")
    ),
    "more classes than the labels have": Case(
        train("dataset={folder}/data", "train.model.num_categories=80", "train.supervision=masks"),
        2,
        ("train.model.num_categories=80", "categories"),
    ),
    "unknown supervision": Case(
        train("train.supervision=points"), 2, ("train.supervision='points'", "'free_masks', 'masks' or 'boxes'")
    ),
    "sweep of nothing there is": Case(
        job(
            "tune_solo",
            "configs/tune/solo_learning_rate.yaml",
            'tune.space={{"train.optimizer.rate":{{"grid":[0.1]}}}}',
        ),
        2,
        ("tune.space: train.optimizer.rate: no such setting", "train.optimizer.learning_rate"),
    ),
    "sweep by what is never reported": Case(
        job("tune_solo", "configs/tune/solo_learning_rate.yaml", "tune.metric=loss/dice"),
        2,
        ("tune.metric=loss/dice", "loss/pairwise"),
    ),
    "sizes that are none": Case(
        train("train.views.short_sides=[]"), 2, ("train.views.short_sides=[]", "at least 1 item")
    ),
    "range from high to low": Case(
        pretrain("pretrain.views.blur_sigma=[2.0,0.1]"), 2, ("pretrain.views.blur_sigma", "give [low, high]")
    ),
    "override that is no YAML": Case(
        train("train.loop.steps=["), 2, ("'train.loop.steps=['", "not valid YAML", "put it in quotes")
    ),
    "row that sets nothing there is": Case(
        job("run_ablations", "configs/ablations/smoke.yaml", 'rows.pairless={{"train.losses.pairs":0.0}}'),
        2,
        ("rows.pairless", "train.losses.pairs: no such setting", "did you mean train.losses.pairwise?"),
    ),
    "row that sets the seed's section": Case(
        job(
            "run_ablations", "configs/ablations/smoke.yaml", 'rows.pairless={{"train":{{"losses":{{"pairwise":0.0}}}}}}'
        ),
        2,
        ("rows.pairless", "train: holds the seed, train.loop.seed", "set what is inside of it"),
    ),
    "row that changes nothing": Case(
        job("run_ablations", "configs/ablations/smoke.yaml", 'rows.patient={{"train.stream.max_bad_samples":0.5}}'),
        2,
        ("rows.patient: is the same as base", "what is forgiven changes no result", "set something that is run"),
    ),
    "groups of channels": Case(
        train("train.model.head.tower_channels=48"), 2, ("train.model.head: tower_channels=48", "not divisible by 32")
    ),
    "batch and workers": Case(
        pretrain("resources.workers=3"), 2, ("pretrain.loop.batch_size=4", "3 workers", "change one of them")
    ),
    "queue and batch": Case(
        pretrain("pretrain.model.queue_length=30"),
        2,
        ("model.queue_length=30", "loop.batch_size=4", "make it a multiple"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good things, and some that are wrong."""
    folder = tmp_path_factory.mktemp("bad-input")
    annotations = compose_scenes(str(folder / "photos"), 6, size=64, seed=0)
    pack(annotations, str(folder / "data"), samples_per_shard=4)
    pack(str(folder / "photos" / "images"), str(folder / "plain"))
    pack(compose_scenes(str(folder / "others"), 4, size=64, seed=1), str(folder / "other"))
    shutil.copy(next((folder / "photos" / "images").iterdir()), folder / "photo.jpg")
    (folder / "empty").mkdir()
    (folder / "unreadable").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / "unreadable" / name).touch()
    label(folder / "data", folder / "labels")
    for kind in ("data", "labels"):
        shutil.copytree(folder / kind, folder / f"newer-{kind}")
        manifest = folder / f"newer-{kind}" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 9}))
    backbone = build_resnet("resnet18").initialise(torch.Generator().manual_seed(0))
    save_model(folder / "backbone.pt", "backbone", {"backbone": "resnet18"}, backbone.state_dict(), {})
    segmenter = Segmenter(MODEL).initialise(torch.Generator().manual_seed(0))
    save_model(folder / "segmenter.pt", "segmenter", MODEL.model_dump(), segmenter.state_dict(), {})
    write_configurations(folder)
    (folder / "runs").mkdir()
    begin_run(folder)
    server = resolve_server(TrackingSettings(uri=f"sqlite:///{folder}/runs/mlflow.db"), str(folder / "runs"))
    assert server is not None
    register_backbone(folder / "backbone.pt", "backbone", server, experiment="freesolo")
    return folder


def label(dataset: Path, labels: Path) -> None:
    """A label set in which nothing was found."""
    manifest = read_dataset_manifest(str(dataset))
    begin_label_set(str(labels), LabelPlan(manifest.digest, str(dataset), "free-masks", {"weights": "w"}, {}, None))
    for shard in manifest.shards:
        records = [
            ImageLabels(sample.key, sample.image_id, sample.file_name, sample.width, sample.height, None, ())
            for sample in read_shard(str(dataset), shard)
        ]
        write_label_file(str(labels), shard.name, records)
    finish_label_set(str(labels), manifest)


def begin_run(folder: Path) -> None:
    """A training that stopped before its end."""
    job = load_config(TrainJob, folder / "train.yaml", [f"dataset={folder}/data"])

    def stop(_: None) -> StageResult:
        raise JobError("the power went")

    with pytest.raises(JobError):
        run_stage(StageFolder(str(folder / "runs"), "begun", "solo"), what_is_made(job), lambda: None, stop)


def write_configurations(folder: Path) -> None:
    loop = {"steps": 3, "batch_size": 4}
    configurations = {
        "train": {"dataset": "unset", "train": {"model": MODEL.model_dump(mode="json"), "loop": loop}},
        "pretrain": {
            "dataset": "unset",
            "pretrain": {"model": {"backbone": "resnet34", "queue_length": 32}, "loop": loop},
        },
        "evaluate": {"dataset": "unset", "labels": {"Free Mask": str(folder / "labels")}},
    }
    for name, configuration in configurations.items():
        (folder / f"{name}.yaml").write_text(json.dumps(configuration))


@pytest.fixture(scope="module")
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed_port: int) -> None:
    """Of a person with credentials of a store that is away, and no tracking server."""
    S3FileSystem.clear_instance_cache()  # fsspec keeps one connected client a process
    monkeypatch.chdir(ROOT)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(retry, "PATIENCE", retry.Patience(seconds=0.0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def run(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process; its exit code."""
    program, *arguments = command
    if program == "freesolo":
        return cli.main(arguments)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder; of the database only that it is there, because MLflow writes into it to read it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and path.suffix != ".db" else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_and_nothing_is_touched(
    name: str,
    folder: Path,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = CASES[name]
    if not case.credentials:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    before, connected = contents(folder), ray.is_initialized()
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        code = run(case.command.format(folder=folder, port=closed_port).split(), monkeypatch)
    output, errors = capfd.readouterr()
    assert code == case.code, errors
    assert output == ""
    *progress, line, end = errors.split("\n")
    assert end == ""
    assert len(progress) == case.begun, errors
    assert line.startswith("error: ")
    rest = line
    for word in (word.format(folder=folder, port=closed_port) for word in case.words):
        assert word in rest, f"{word!r} is not in its place in {line!r}"
        rest = rest.partition(word)[2]
    assert caplog.messages == []
    assert ray.is_initialized() == connected, "Ray was started for nothing"
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after == before


@pytest.mark.parametrize(
    "command", ["freesolo inspect --debug {folder}/empty", train("dataset={folder}/empty", "--debug")]
)
def test_with_debug_there_is_a_traceback_too(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command.format(folder=folder).split(), monkeypatch) == 2
    first, *_, last, end = capfd.readouterr().err.split("\n")
    assert first == "Traceback (most recent call last):"
    assert last.startswith(f"error: {folder}/empty: ")
    assert end == ""


def test_what_was_refused_can_be_put_right_under_the_same_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A typo in a job does not leave a run behind that refuses the corrected job for having other settings."""
    storage = StageFolder(str(folder / "runs"), "corrected", "evaluation")
    for dataset, code in (("plain", 2), ("data", 0)):
        command = evaluate(f"dataset={{folder}}/{dataset}", "tracking.uri=off").format(folder=folder)
        assert run(command.replace("--run-name new", "--run-name corrected").split(), monkeypatch) == code
    assert json.loads(capfd.readouterr().out)["outputs"] == {"report": f"{storage.url}/report/index.html"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("freesolo pack a b --samples-per-shard 0", "--samples-per-shard: '0' is not a number from 1"),
        ("freesolo pack a b --max-bad-samples 2", "--max-bad-samples: '2' is not a number from 0 to 1"),
        ("freesolo predict m p --out x --min-score much", "--min-score: 'much' is not a number from 0 to 1"),
        ("jobs/evaluate.py --run-name r --storage s", "required: --config"),
    ],
)
def test_arguments_that_are_wrong(
    command: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments) if program == "freesolo" else runpy.run_path(str(ROOT / program), run_name="__main__")
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
