"""Marks that several test files carry."""

from __future__ import annotations

import pytest

# Ray Train's own: it uses deprecated calls of itself, and leaves sockets to the garbage collector.
IGNORE_WARNINGS_OF_RAY_TRAIN = (
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)
