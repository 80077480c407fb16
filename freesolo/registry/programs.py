"""Exported programs beside a registered model: files of its version that need no freesolo to run."""

from __future__ import annotations

from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from freesolo.models.download import sha256_of_file
from freesolo.registry.client import find_version, talking_to
from freesolo.tracking.server import TrackingServer

FOLDER = "programs"
TAG = "freesolo.program."
"""Of a version, followed by the file's name: the file's SHA-256."""


def register_program(file: Path, name: str, version: str, server: TrackingServer) -> str:
    """Put a file beside a version's model; one of the same name is replaced.

    Args:
        file: Its name is the one that it has in the version.
        name: Of the registered model.
        version: Of the registered model.
        server: Whose registry.

    Returns:
        Where it is: what `mlflow artifacts download` takes.

    Raises:
        UsageError: There is no such model or version.
        JobError: The registry does not answer.
    """
    with talking_to(server, f"{file.name} was not put beside models:/{name}/{version}") as client:
        find_version(client, name, version)
        location = client.get_model_version_download_uri(name, version)
        repository = get_artifact_repository(location, tracking_uri=server.uri)
        repository.log_artifact(str(file), FOLDER)  # type: ignore[no-untyped-call]
        # The tag last: what has it is there.
        client.set_model_version_tag(name, version, TAG + file.name, sha256_of_file(file))
    return f"{location}/{FOLDER}/{file.name}"
