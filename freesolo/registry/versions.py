"""Registering: a model file becomes the newest version of a name, and its candidate."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from freesolo.models.model_file import load_model
from freesolo.provenance import code_version
from freesolo.registry.client import talking_to
from freesolo.registry.served_model import ServedModel
from freesolo.settings import PredictSettings
from freesolo.tracking.mlflow_run import experiment_id
from freesolo.tracking.server import TrackingServer

CANDIDATE = "candidate"


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        name: Of the model.
        version: Number of the version.
        sha256: Of the model file.
    """

    name: str
    version: str
    sha256: str

    @property
    def reference(self) -> str:
        """What `resolve_weights` takes, as `models:/freesolo/3`."""
        return f"models:/{self.name}/{self.version}"


def register_segmenter(
    model_file: Path,
    name: str,
    server: TrackingServer,
    *,
    experiment: str,
    predict: PredictSettings | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Register a segmenter as the newest version of `name` and its candidate.

    Served, it takes a binary column `image` of photos as files, and answers `masks` (COCO run-length encodings),
    `boxes` (`[x, y, width, height]`), `scores` and `category_ids` for each.

    A version with the same file and settings as the newest is not registered again: a stage that was killed between
    registering and saying so can be repeated.

    Args:
        model_file: Of kind "segmenter".
        name: Of the registered model; made where there is none.
        server: Whose registry.
        experiment: Where MLflow shows the model, where `run_id` does not say.
        predict: Input size and thresholds of the served model; default: PredictSettings().
        run_id: MLflow's id of the run that made it; None where the server did not get to know it.
        tags: Of the version, beside what the model file says.

    Raises:
        UsageError: The file is not a segmenter's, or MLflow refuses the name.
        JobError: The registry does not answer.
    """
    config = {"predict": (predict or PredictSettings()).model_dump(mode="json")}
    served = ServedModel(model_file, load_model(model_file, "segmenter"), config)
    return _register(served, name, server, experiment, run_id, tags or {})


def register_backbone(
    model_file: Path,
    name: str,
    server: TrackingServer,
    *,
    experiment: str,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> RegisteredVersion:
    """Register a backbone as the newest version of `name` and its candidate.

    Served, it takes a binary column `image` of photos as files and answers an `embedding` for each. For the rest see
    `register_segmenter`.

    Raises:
        UsageError: The file is not a backbone's, or MLflow refuses the name.
        JobError: The registry does not answer.
    """
    served = ServedModel(model_file, load_model(model_file, "backbone"), {})
    return _register(served, name, server, experiment, run_id, tags or {})


def _register(
    served: ServedModel, name: str, server: TrackingServer, experiment: str, run_id: str | None, tags: Mapping[str, str]
) -> RegisteredVersion:
    with talking_to(server, f"{name} was not registered") as client:
        _make_model(client, name)
        version = _newest_if_same(client, name, served.tags())
        if version is None:
            logged = _log(client, served, name, run_id, experiment_id(client, server, experiment))
            made = client.create_model_version(
                name,
                logged.artifact_location,
                run_id,
                {**served.tags(), "code_version": code_version(), **tags},
                # Given a model and no run, MLflow's database code looks the run up at the process's global address.
                model_id=logged.model_id if run_id is not None or server.artifact_root is None else None,
            )
            version = str(made.version)
        client.set_registered_model_alias(name, CANDIDATE, version)
    return RegisteredVersion(name, version, served.model.sha256)


def _make_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _newest_if_same(client: MlflowClient, name: str, tags: Mapping[str, str]) -> str | None:
    newest = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if newest and tags.items() <= newest[0].tags.items():
        return str(newest[0].version)
    return None


def _log(client: MlflowClient, served: ServedModel, name: str, run_id: str | None, experiment: str) -> LoggedModel:
    """Upload a model, as one that the run made."""
    if run_id is not None:
        experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name, source_run_id=run_id, model_type=served.model.kind)
    flavoured = Model(
        artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id
    )
    with tempfile.TemporaryDirectory() as folder:
        served.save(Path(folder) / "model", flavoured)
        client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged
