"""How many tasks read for a stream, and how much a task is given."""

from __future__ import annotations

import pytest
from ray.data import DataContext

from freesolo.data.ingest import _context, _readers


@pytest.mark.parametrize(("cpus", "readers"), [(0.5, 1), (1.0, 1), (7.0, 1), (8.0, 2), (24.0, 6)])
def test_one_reads_for_four_that_decode_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, cpus: float, readers: int
) -> None:
    options = DataContext.get_current().execution_options
    monkeypatch.setattr(options, "resource_limits", options.resource_limits.copy(cpu=cpus))
    assert _readers() == readers


def test_a_stream_has_tasks_of_its_own_size_and_leaves_those_of_others_alone() -> None:
    others = DataContext.get_current().target_max_block_size
    assert _context(12_345).target_max_block_size == 12_345
    assert DataContext.get_current().target_max_block_size == others != 12_345
