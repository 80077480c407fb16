"""Weights by reference: a path, a URL, a published name or a registered model, onto this machine's disk."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import mlflow.artifacts

from freesolo.data.files import is_local, open_stream
from freesolo.errors import JobError, UsageError
from freesolo.models.download import sha256_of_file
from freesolo.models.published import PUBLISHED, pull
from freesolo.registry.client import find_version, talking_to, version_of_alias
from freesolo.registry.served_model import MODEL_NAME, SHA256_TAG
from freesolo.tracking.server import TrackingServer

_REFERENCE = re.compile(r"models:/(?P<name>[^@/]+)(@(?P<alias>[^@/]+)|/(?P<version>\d+))")


@dataclass(frozen=True, slots=True)
class ResolvedWeights:
    """Weights on this machine's disk.

    Attributes:
        path: The file.
        sha256: Of the file, in hexadecimal.
        name: Of the registered model; None where they are not from the registry.
        version: Of the registered model; None where they are not from the registry.
    """

    path: Path
    sha256: str
    name: str | None = None
    version: str | None = None


def resolve_weights(reference: str, cache_dir: Path, *, server: TrackingServer | None = None) -> ResolvedWeights:
    """Get weights onto this machine's disk.

    Args:
        reference: A path, an fsspec URL, an `http(s)://` address, the name of published weights
            (`freesolo.models.published.PUBLISHED`), `models:/name@alias` or `models:/name/3`.
        cache_dir: Where to put what is not on this machine yet; made if need be.
        server: Whose registry `models:/` means; None: there is none.

    Raises:
        UsageError: There is no such file, model, alias or version; lists those that there are.
        JobError: The store or the registry does not answer.
    """
    if reference.startswith("models:"):
        return _from_registry(reference, cache_dir, server)
    if reference in PUBLISHED or urlsplit(reference).scheme in ("http", "https"):
        path = pull(reference, cache_dir)
        return ResolvedWeights(path, sha256_of_file(path))
    if is_local(reference):
        path = Path(urlsplit(reference).path if "://" in reference else reference)
        if not path.is_file():
            raise UsageError(f"{reference}: no such weights file; published ones are {', '.join(PUBLISHED)}")
        return ResolvedWeights(path, sha256_of_file(path))
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        fetched = Path(folder) / PurePosixPath(urlsplit(reference).path).name
        with open_stream(reference) as source, fetched.open("wb") as target:
            shutil.copyfileobj(source, target)
        return _keep(fetched, cache_dir)


def _from_registry(reference: str, cache_dir: Path, server: TrackingServer | None) -> ResolvedWeights:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference}: write models:/name@alias or models:/name/3")
    if server is None:
        raise UsageError(f"{reference}: there is no registry with tracking.uri=off; give a file, or set tracking.uri")
    database = Path(server.uri.removeprefix("sqlite:///"))
    if server.uri.startswith("sqlite:///") and not database.is_file():  # asked, MLflow would make one
        raise UsageError(
            f"{reference}: no model was ever registered in {database}; give the storage, or the tracking server, where "
            "one was"
        )
    name = match["name"]
    with talking_to(server, f"{reference} was not found") as client:
        version = match["version"] or version_of_alias(client, name, match["alias"])
        sha256 = find_version(client, name, version).tags.get(SHA256_TAG)
        if sha256 is None:
            raise UsageError(f"{reference}: not a model of freesolo: version {version} holds no {MODEL_NAME}")
        cached = cache_dir / f"{sha256}.pt"
        if not (cached.is_file() and sha256_of_file(cached) == sha256):
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
                # Not `models:/...`, which MLflow looks up at the process's global address.
                location = client.get_model_version_download_uri(name, version)
                fetched = mlflow.artifacts.download_artifacts(
                    f"{location}/artifacts/{MODEL_NAME}", dst_path=folder, tracking_uri=server.uri
                )
                found = _keep(Path(fetched), cache_dir).sha256
            if found != sha256:
                raise JobError(f"{reference}: its file has sha256 {found}, {sha256} was registered: register it again")
    return ResolvedWeights(cached, sha256, name, version)


def _keep(fetched: Path, cache_dir: Path) -> ResolvedWeights:
    """Move a file into the cache under its checksum; several processes may do so at once."""
    sha256 = sha256_of_file(fetched)
    path = cache_dir / f"{sha256}.pt"
    fetched.replace(path)
    return ResolvedWeights(path, sha256)
