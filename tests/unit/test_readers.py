"""How many tasks read for a stream."""

from __future__ import annotations

import pytest
from ray.data import DataContext

from freesolo.data.ingest import _readers


@pytest.mark.parametrize(("cpus", "readers"), [(0.5, 1), (1.0, 1), (7.0, 1), (8.0, 2), (24.0, 6)])
def test_one_reads_for_four_that_decode_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, cpus: float, readers: int
) -> None:
    options = DataContext.get_current().execution_options
    monkeypatch.setattr(options, "resource_limits", options.resource_limits.copy(cpu=cpus))
    assert _readers() == readers
