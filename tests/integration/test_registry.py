"""The registry against a real MLflow on SQLite; the same over a real server is in test_tracking_server.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

import jaxtyping
import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from freesolo import cli
from freesolo.data.files import write_atomic
from freesolo.data.photos import decode_photo
from freesolo.errors import JobError, UsageError
from freesolo.inference.answers import EmbedPhotos
from freesolo.inference.segment import SegmentPhotos
from freesolo.models.download import sha256_of_file
from freesolo.models.model_file import load_model, save_model
from freesolo.models.resnet import build_resnet
from freesolo.ops.masks import boxes_xywh, decode_rle
from freesolo.registry.champion import promote_if_better
from freesolo.registry.versions import RegisteredVersion, register_backbone, register_segmenter
from freesolo.registry.weights import resolve_weights
from freesolo.settings import InferenceSettings, PredictSettings, TrackingSettings
from freesolo.solo.model import Segmenter
from freesolo.tracking.journal import Journal
from freesolo.tracking.server import TrackingServer, resolve_server
from freesolo.tracking.witness import TrackedRun, Witness
from tests.small import small_solo

TINY = small_solo(num_categories=2, fpn_channels=32, embedding_channels=8, grid_sizes=(5, 4, 3, 2, 2))
# An untrained network says about 0.01 of every cell: the best five are taken.
PREDICT = PredictSettings(
    short_side=64,
    long_side_max=100,
    max_width=1.0,
    inference=InferenceSettings(min_category_score=0.0, min_score=0.0, max_instances=5),
)
DATA, OTHER_DATA = "a" * 64, "b" * 64


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def server(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingServer:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)  # MLflow's global address, where nothing must go, is a file in the working folder
    (tmp_path / "storage").mkdir()
    shutil.copyfile(empty_database, tmp_path / "storage" / "mlflow.db")
    server = resolve_server(TrackingSettings(), str(tmp_path / "storage"))
    assert server is not None
    return server


@pytest.fixture
def nothing_went_astray(tmp_path: Path) -> Iterator[None]:
    yield
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()


@pytest.fixture
def client(server: TrackingServer) -> MlflowClient:
    return MlflowClient(server.uri)


@pytest.fixture(scope="session")
def segmenter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "trained-segmenter.bin"
    segmenter = Segmenter(TINY).initialise(torch.Generator().manual_seed(0))
    lineage = {"dataset": "s3://b/photos", "rounds": 2}
    save_model(path, "segmenter", TINY.model_dump(), segmenter.state_dict(), lineage)
    return path


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.pt"
    backbone = build_resnet("resnet18").initialise(torch.Generator().manual_seed(0))
    save_model(path, "backbone", {"backbone": "resnet18"}, backbone.state_dict(), {"dataset": "s3://b/photos"})
    return path


@pytest.fixture(scope="session")
def photo() -> bytes:
    jpeg = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(jpeg, "JPEG")
    return jpeg.getvalue()


def register(server: TrackingServer, model_file: Path, *, seed: int = 0) -> RegisteredVersion:
    """A version of its own for each seed, which becomes a tag: the weights may be the same."""
    return register_backbone(model_file, "backbone", server, experiment="freesolo", tags={"seed": str(seed)})


def variants(backbone_file: Path, folder: Path, count: int) -> list[Path]:
    """Model files that differ in their lineage."""
    model = load_model(backbone_file)
    paths = [folder / f"{number}.pt" for number in range(count)]
    for number, path in enumerate(paths):
        save_model(path, "backbone", model.settings, model.state_dict, {"number": number})
    return paths


# --- exported programs ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_went_astray")
def test_a_program_is_kept_beside_its_model(
    server: TrackingServer, client: MlflowClient, segmenter_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # while traced, what is an int stands for any
    register_segmenter(segmenter_file, "solo", server, experiment="freesolo", predict=PREDICT)
    model = ["models:/solo@candidate", "solo.pt2", "--format", "torch-export", "--storage", "storage"]
    assert cli.main(["export", "program", *model, "--register"]) == 0
    version = client.get_model_version("solo", "1")
    location = client.get_model_version_download_uri("solo", "1")
    kept = mlflow.artifacts.download_artifacts(f"{location}/programs/segmenter.pt2", tracking_uri=server.uri)
    sha256 = sha256_of_file(Path(kept))
    assert version.tags["freesolo.program.segmenter.pt2"] == sha256 == sha256_of_file(Path("solo.pt2"))
    about = {"freesolo.json": ""}
    program = torch.export.load(kept, extra_files=about).module()
    assert json.loads(about["freesolo.json"])["sha256"] == sha256_of_file(segmenter_file)
    assert program(torch.zeros(1, 3, 80, 100, dtype=torch.uint8))["category_logits"].shape[:2] == (1, 2)
    onnx = [*model[:1], "solo.onnx", "--format", "onnx", *model[4:], "--register"]
    assert cli.main(["export", "program", *onnx]) == 0
    kept = mlflow.artifacts.download_artifacts(f"{location}/programs/segmenter.onnx", tracking_uri=server.uri)
    sha256 = client.get_model_version("solo", "1").tags["freesolo.program.segmenter.onnx"]
    assert sha256 == sha256_of_file(Path(kept)) == sha256_of_file(Path("solo.onnx"))
    # The model beside it is found as before, and a file is beside nothing.
    assert resolve_weights("models:/solo/1", Path("cache"), server=server).sha256 == sha256_of_file(segmenter_file)
    assert cli.main(["export", "program", str(segmenter_file), *model[1:], "--register"]) == 2


# --- registering ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_went_astray")
def test_a_registered_segmenter_serves_what_it_predicts(
    server: TrackingServer, client: MlflowClient, segmenter_file: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = register_segmenter(segmenter_file, "solo", server, experiment="freesolo", predict=PREDICT)
    assert (registered.name, registered.version) == ("solo", "1")
    assert registered.sha256 == sha256_of_file(segmenter_file)
    assert registered.reference == "models:/solo/1"
    version = client.get_model_version_by_alias("solo", "candidate")
    assert str(version.version) == "1"
    assert version.tags["lineage.dataset"] == "s3://b/photos"
    assert version.tags["lineage.rounds"] == "2"
    assert (version.tags["kind"], version.tags["backbone"]) == ("segmenter", "resnet18")

    # As a user loads it, by the global address.
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", server.uri)
    served = mlflow.pyfunc.load_model("models:/solo@candidate")
    assert served.metadata.signature.inputs.input_names() == ["image"]
    assert served.metadata.signature.outputs.input_names() == ["masks", "boxes", "scores", "category_ids"]
    assert served.input_example["image"][0].startswith(b"\x89PNG")
    grey = BytesIO()
    Image.new("L", (33, 20), 128).save(grey, "PNG")
    answers = served.predict([{"image": photo}, {"image": grey.getvalue()}])

    expected = SegmentPhotos.from_file(segmenter_file, PREDICT)([decode_photo(photo), decode_photo(grey.getvalue())])
    assert json.loads(json.dumps(answers)) == answers
    for answer, instances in zip(answers, expected, strict=True):
        height, width = instances.masks.shape[1:]
        assert len(answer["masks"]) == len(instances) == 5
        assert torch.equal(decode_rle(answer["masks"], height, width), instances.masks)
        assert answer["boxes"] == boxes_xywh(instances.masks).tolist()
        assert answer["scores"] == pytest.approx(instances.scores.tolist())
        assert answer["category_ids"] == instances.category_ids.tolist()
    assert served.predict(served.input_example)[0]["masks"][0]["size"] == [48, 64]
    with pytest.raises(ValueError, match="image 1: "):
        served.predict([{"image": photo}, {"image": b"not a photo"}])


def test_a_registered_backbone_serves_embeddings(
    server: TrackingServer, backbone_file: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backbone(backbone_file, "backbone", server, experiment="freesolo")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", server.uri)
    served = mlflow.pyfunc.load_model("models:/backbone@candidate")
    (answer,) = served.predict([{"image": photo}])
    expected = EmbedPhotos(load_model(backbone_file), torch.device("cpu"))(decode_photo(photo))
    assert len(answer["embedding"]) == 512
    assert np.linalg.norm(answer["embedding"]) == pytest.approx(1.0, abs=1e-5)
    assert answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_model_is_served_without_the_package_and_without_ray(
    server: TrackingServer, client: MlflowClient, segmenter_file: Path, photo: bytes, tmp_path: Path
) -> None:
    register_segmenter(segmenter_file, "solo", server, experiment="freesolo", predict=PREDICT)
    location = client.get_model_version_download_uri("solo", "1")
    (tmp_path / "photo.jpg").write_bytes(photo)
    assert not list(Path(location).rglob("__pycache__"))
    script = f"""
        import importlib.abc, sys, warnings
        class Absent(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("ray", "webdataset", "fsspec", "s3fs", "botocore"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Absent())
        # The package is here only as the code that was logged with the model.
        sys.path = [p for p in sys.path if not p.startswith({str(Path.cwd())!r}) and p != {str(REPOSITORY)!r}]
        sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
        import mlflow.pyfunc
        model = mlflow.pyfunc.load_model({location!r})
        answer = model.predict([{{"image": open({str(tmp_path / "photo.jpg")!r}, "rb").read()}}])
        import freesolo
        print(freesolo.__file__)
        print(len(answer[0]["masks"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    package, masks = done.stdout.strip().splitlines()[-2:]
    assert package.startswith(location)
    assert masks == "5"


REPOSITORY = Path(__file__).parents[2]


def test_the_candidate_is_always_the_newest_version(
    server: TrackingServer, client: MlflowClient, backbone_file: Path, tmp_path: Path
) -> None:
    files = variants(backbone_file, tmp_path, 2)
    assert [register(server, file).version for file in files] == ["1", "2"]
    assert str(client.get_model_version_by_alias("backbone", "candidate").version) == "2"
    assert [register(server, file).version for file in files] == ["3", "4"]


def test_registering_the_same_again_makes_no_version(
    server: TrackingServer, client: MlflowClient, segmenter_file: Path
) -> None:
    first = register_segmenter(segmenter_file, "solo", server, experiment="freesolo", predict=PREDICT)
    client.delete_registered_model_alias("solo", "candidate")  # as if killed just before it was set
    again = register_segmenter(segmenter_file, "solo", server, experiment="freesolo", predict=PREDICT)
    assert again == first
    assert str(client.get_model_version_by_alias("solo", "candidate").version) == "1"
    other = register_segmenter(segmenter_file, "solo", server, experiment="freesolo")  # served with other settings
    assert other.version == "2"


def test_a_version_belongs_to_the_run_that_made_it(
    server: TrackingServer, client: MlflowClient, backbone_file: Path, tmp_path: Path
) -> None:
    journal = Journal(str(tmp_path / "run"))
    witness = Witness(TrackedRun(str(tmp_path / "run"), "pretrain", "trials", server), journal)
    assert witness.close(timeout=60).reason is None
    journal.close()
    register_backbone(backbone_file, "backbone", server, experiment="elsewhere", run_id=witness.run_id)
    assert client.get_model_version("backbone", "1").run_id == witness.run_id
    outputs = client.get_run(str(witness.run_id)).outputs.model_outputs
    experiment = client.get_experiment_by_name("trials").experiment_id
    (logged,) = client.search_logged_models([experiment])
    assert [output.model_id for output in outputs] == [logged.model_id]
    assert client.get_experiment_by_name("elsewhere") is None or not client.search_logged_models(
        [client.get_experiment_by_name("elsewhere").experiment_id]
    )


def test_the_wrong_kind_of_model_is_refused(server: TrackingServer, segmenter_file: Path, backbone_file: Path) -> None:
    with pytest.raises(UsageError, match="holds a backbone, and a segmenter is needed"):
        register_segmenter(backbone_file, "solo", server, experiment="freesolo")
    with pytest.raises(UsageError, match="holds a segmenter, and a backbone is needed"):
        register_backbone(segmenter_file, "solo", server, experiment="freesolo")


def test_a_name_that_mlflow_refuses_is_a_usage_error(server: TrackingServer, backbone_file: Path) -> None:
    with pytest.raises(UsageError, match=r"a/b was not registered: .*Invalid"):
        register_backbone(backbone_file, "a/b", server, experiment="freesolo")


# --- the champion ----------------------------------------------------------------------------------------------------


def champion(client: MlflowClient) -> str | None:
    alias = client.get_registered_model("backbone").aliases.get("champion")
    return None if alias is None else str(alias)


@pytest.fixture
def three_versions(server: TrackingServer, backbone_file: Path, tmp_path: Path) -> None:
    for file in variants(backbone_file, tmp_path, 3):
        register(server, file)


@pytest.mark.usefixtures("three_versions")
def test_the_champion_is_moved_by_a_better_evaluation_on_the_same_data_only(
    server: TrackingServer, client: MlflowClient
) -> None:
    first = promote_if_better("backbone", "1", {"segm/AP50": 0.2, "corloc": None}, DATA, server=server)
    assert (first.promoted, first.champion) == (True, "1")
    assert "first with an evaluation" in first.reason
    assert champion(client) == "1"

    worse = promote_if_better("backbone", "2", {"segm/AP50": 0.1}, DATA, server=server)
    assert (worse.promoted, worse.champion) == (False, "1")
    assert worse.reason == "not better: segm/AP50 0.1000 of version 2 against 0.2000 of version 1"
    equal = promote_if_better("backbone", "2", {"segm/AP50": 0.2}, DATA, server=server)
    assert not equal.promoted

    elsewhere = promote_if_better("backbone", "2", {"segm/AP50": 0.9}, OTHER_DATA, server=server)
    assert (elsewhere.promoted, elsewhere.champion) == (False, "1")
    assert "evaluated on other data" in elsewhere.reason
    assert champion(client) == "1"

    better = promote_if_better("backbone", "3", {"segm/AP50": 0.2000001}, DATA, server=server)
    assert (better.promoted, better.champion) == (True, "3")
    assert champion(client) == "3"
    assert str(client.get_model_version_by_alias("backbone", "candidate").version) == "3"


@pytest.mark.usefixtures("three_versions")
def test_an_evaluation_is_recorded_whatever_comes_of_it(server: TrackingServer, client: MlflowClient) -> None:
    promote_if_better("backbone", "1", {"segm/AP50": 0.5}, DATA, server=server)
    promote_if_better("backbone", "2", {"segm/AP50": 1 / 3, "bbox/AP": 0.25, "corloc": None}, DATA, server=server)
    tags = client.get_model_version("backbone", "2").tags
    assert tags["evaluation.dataset_digest"] == DATA
    assert float(tags["evaluation.segm/AP50"]) == 1 / 3
    assert float(tags["evaluation.bbox/AP"]) == 0.25
    assert "evaluation.corloc" not in tags


@pytest.mark.usefixtures("three_versions")
def test_the_champion_evaluated_again_stays_and_is_compared_by_its_new_numbers(
    server: TrackingServer, client: MlflowClient
) -> None:
    promote_if_better("backbone", "1", {"segm/AP50": 0.5}, DATA, server=server)
    again = promote_if_better("backbone", "1", {"segm/AP50": 0.3}, OTHER_DATA, server=server)
    assert (again.promoted, again.champion) == (False, "1")
    assert "champion already" in again.reason
    assert promote_if_better("backbone", "2", {"segm/AP50": 0.4}, OTHER_DATA, server=server).promoted
    assert champion(client) == "2"


@pytest.mark.usefixtures("three_versions")
def test_what_cannot_be_compared_moves_nothing(server: TrackingServer, client: MlflowClient) -> None:
    for undefined in (None, float("nan")):
        decision = promote_if_better("backbone", "1", {"segm/AP50": undefined}, DATA, server=server)
        assert (decision.promoted, decision.champion) == (False, None)
        assert "undefined" in decision.reason
    assert champion(client) is None
    client.set_registered_model_alias("backbone", "champion", "2")  # by hand
    decision = promote_if_better("backbone", "3", {"segm/AP50": 0.9}, DATA, server=server)
    assert (decision.promoted, decision.champion) == (False, "2")
    assert "version 2, has no evaluation with segm/AP50" in decision.reason


@pytest.mark.usefixtures("three_versions")
def test_another_metric_may_decide(server: TrackingServer) -> None:
    promote_if_better("backbone", "1", {"segm/AP50": 0.9, "corloc": 0.1}, DATA, server=server, metric="corloc")
    numbers = {"segm/AP50": 0.1, "corloc": 0.2}
    assert promote_if_better("backbone", "2", numbers, DATA, server=server, metric="corloc").promoted
    with pytest.raises(UsageError, match=r"segm/AP: not among the metrics of this evaluation: corloc, segm/AP50"):
        promote_if_better("backbone", "2", numbers, DATA, server=server, metric="segm/AP")


@pytest.mark.usefixtures("three_versions")
def test_a_version_that_there_is_not_cannot_be_evaluated(server: TrackingServer) -> None:
    with pytest.raises(UsageError, match=r"models:/backbone/9: no such version; there are: 1, 2, 3"):
        promote_if_better("backbone", "9", {"segm/AP50": 0.9}, DATA, server=server)


# --- weights by reference --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_went_astray")
def test_registered_weights_are_fetched_by_alias_and_by_number(
    server: TrackingServer, backbone_file: Path, tmp_path: Path
) -> None:
    files = variants(backbone_file, tmp_path, 2)
    registered = [register(server, file) for file in files]
    promote_if_better("backbone", "1", {"segm/AP50": 0.5}, DATA, server=server)
    cache = tmp_path / "cache"
    by_alias = resolve_weights("models:/backbone@champion", cache, server=server)
    assert (by_alias.name, by_alias.version, by_alias.sha256) == ("backbone", "1", registered[0].sha256)
    assert by_alias.path.read_bytes() == files[0].read_bytes()
    by_number = resolve_weights("models:/backbone/2", cache, server=server)
    assert (by_number.version, by_number.sha256) == ("2", sha256_of_file(files[1]))
    assert sorted(file.name for file in cache.iterdir()) == sorted(f"{one.sha256}.pt" for one in registered)


def test_a_damaged_file_in_the_cache_is_fetched_again_and_a_whole_one_is_not(
    server: TrackingServer, client: MlflowClient, backbone_file: Path, tmp_path: Path
) -> None:
    register(server, backbone_file)
    resolved = resolve_weights("models:/backbone/1", tmp_path / "cache", server=server)
    resolved.path.write_bytes(b"damaged")
    assert resolve_weights("models:/backbone/1", tmp_path / "cache", server=server) == resolved
    assert sha256_of_file(resolved.path) == resolved.sha256
    stored = Path(client.get_model_version_download_uri("backbone", "1")) / "artifacts" / "model.pt"
    stored.write_bytes(b"altered in the store")
    assert resolve_weights("models:/backbone/1", tmp_path / "cache", server=server) == resolved
    with pytest.raises(JobError, match=rf"{resolved.sha256} was registered"):
        resolve_weights("models:/backbone/1", tmp_path / "other", server=server)


def test_what_is_not_registered_lists_what_is(
    server: TrackingServer, client: MlflowClient, backbone_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"models:/backbone: no such model is registered; there are: none"):
        resolve_weights("models:/backbone@champion", tmp_path, server=server)
    register(server, backbone_file)
    client.create_registered_model("another")
    with pytest.raises(UsageError, match=r"models:/backbon: no such model is registered; there are: another, backbone"):
        resolve_weights("models:/backbon/1", tmp_path, server=server)
    with pytest.raises(UsageError, match=r"backbone has no such alias; there are: @candidate"):
        resolve_weights("models:/backbone@champion", tmp_path, server=server)
    with pytest.raises(UsageError, match=r"another has no such alias; there are: none"):
        resolve_weights("models:/another@champion", tmp_path, server=server)
    with pytest.raises(UsageError, match=r"models:/backbone/7: no such version; there are: 1"):
        resolve_weights("models:/backbone/7", tmp_path, server=server)


@pytest.mark.parametrize("reference", ["models:/backbone", "models:backbone/1", "models:/a/b/1", "models:/x@"])
def test_a_malformed_reference_says_how_to_write_it(reference: str, tmp_path: Path, server: TrackingServer) -> None:
    with pytest.raises(UsageError, match=r"write models:/name@alias or models:/name/3"):
        resolve_weights(reference, tmp_path, server=server)


def test_someone_elses_model_is_named(server: TrackingServer, client: MlflowClient, tmp_path: Path) -> None:
    client.create_registered_model("foreign")
    client.create_model_version("foreign", "s3://bucket/model")
    with pytest.raises(UsageError, match="not a model of freesolo"):
        resolve_weights("models:/foreign/1", tmp_path, server=server)


def test_without_a_registry_a_name_means_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"models:/backbone/1: there is no registry with tracking\.uri=off"):
        resolve_weights("models:/backbone/1", tmp_path)


@pytest.mark.parametrize("form", ["{path}", "file://{path}"])
def test_files_on_this_machine_stay_where_they_are(form: str, backbone_file: Path, tmp_path: Path) -> None:
    resolved = resolve_weights(form.format(path=backbone_file), tmp_path / "cache")
    assert (resolved.path, resolved.sha256) == (backbone_file, sha256_of_file(backbone_file))
    assert (resolved.name, resolved.version) == (None, None)
    assert not (tmp_path / "cache").exists()


def test_files_elsewhere_are_fetched_anew_each_time(backbone_file: Path, tmp_path: Path) -> None:
    write_atomic("memory://weights/model.pt", backbone_file.read_bytes())
    first = resolve_weights("memory://weights/model.pt", tmp_path / "cache")
    assert first.path.read_bytes() == backbone_file.read_bytes()
    write_atomic("memory://weights/model.pt", b"replaced")
    second = resolve_weights("memory://weights/model.pt", tmp_path / "cache")
    assert second.path.read_bytes() == b"replaced"
    assert first.path.read_bytes() == backbone_file.read_bytes()
    with pytest.raises(UsageError, match=r"memory://weights/absent\.pt: no such file"):
        resolve_weights("memory://weights/absent.pt", tmp_path / "cache")


def test_a_missing_file_names_the_published_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.pt: no such weights file; published ones are densecl-r50-imagenet"):
        resolve_weights(str(tmp_path / "absent.pt"), tmp_path)


def test_a_registry_that_is_away_says_where_and_what_to_do(backbone_file: Path, tmp_path: Path) -> None:
    away = TrackingServer("http://127.0.0.1:9")
    with pytest.raises(JobError, match=r"backbone was not registered: http://127\.0\.0\.1:9 does not answer.*run the"):
        register_backbone(backbone_file, "backbone", away, experiment="freesolo")
    with pytest.raises(JobError, match=r"models:/backbone/1 was not found: http://127\.0\.0\.1:9 does not answer"):
        resolve_weights("models:/backbone/1", tmp_path, server=away)
    with pytest.raises(JobError, match=r"the evaluation of backbone 1 was not recorded: http://127\.0\.0\.1:9"):
        promote_if_better("backbone", "1", {"segm/AP50": 0.5}, DATA, server=away)
