"""Weights to start from, read once by the driver and handed to every worker through Ray's object store.

A run of several trainings keeps a copy of its own of what they start from.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import ray
from torch import Tensor

from freesolo.data.files import exists, write_atomic
from freesolo.data.ingest import full_memory_told
from freesolo.models.weights import read_state_dict
from freesolo.settings import TrackingSettings
from freesolo.tracking.server import resolve_server


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """A checkpoint's tensors, in the driver.

    Attributes:
        reference: As the user named it.
        tensors: Its state dict.
    """

    reference: str
    tensors: dict[str, Tensor]

    def share(self) -> SharedWeights:
        """Put them into the object store of the cluster that this process is connected to.

        Raises:
            JobError: It is full.
        """
        with full_memory_told():
            return SharedWeights(self.reference, ray.put(self.tensors))


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """A checkpoint's tensors, in the object store.

    Attributes:
        reference: As the user named it.
        tensors: Its state dict.
    """

    reference: str
    tensors: ray.ObjectRef[dict[str, Tensor]]

    def fetch(self) -> InitialWeights:
        """The tensors, in whatever process this is called."""
        return InitialWeights(self.reference, ray.get(self.tensors))


def read_initial_weights(
    reference: str | None, tracking: TrackingSettings, storage: str, *, backbone: str
) -> InitialWeights | None:
    """Read the weights that a path, a URL or `models:/name@alias` names; None for none. Needs no cluster.

    Raises:
        UsageError: There are none of that name, or the file is not a checkpoint, or says that it is of another network
            than `backbone`, of the same tensors.
    """
    if reference is None:
        return None
    # The registry is MLflow's, which takes seconds to import: workers, who only fetch, need not wait for it.
    from freesolo.registry.weights import resolve_weights

    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_weights(reference, Path(folder), server=resolve_server(tracking, storage))
        return InitialWeights(reference, read_state_dict(resolved.path, backbone=backbone))


def keep_weights(reference: str | None, url: str, tracking: TrackingSettings, storage: str) -> str | None:
    """Copy the weights that a reference names to `url`, unless they are there; returns it, and None for none.

    All trainings that start from the copy start from the same, whatever an alias of the registry names meanwhile.

    Raises:
        UsageError, JobError: As `freesolo.registry.weights.resolve_weights`.
    """
    if reference is None:
        return None
    if not exists(url):
        from freesolo.registry.weights import resolve_weights  # as above

        with tempfile.TemporaryDirectory() as folder:
            resolved = resolve_weights(reference, Path(folder), server=resolve_server(tracking, storage))
            write_atomic(url, resolved.path.read_bytes())
    return url
