"""Checkpoints lie where the rest of their run does, however its folder is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from freesolo.data.files import join
from freesolo.data.stores import resolve
from freesolo.train.storage import checkpoint_storage

NAMES = ["plain", "a run", "a#b", "a?b", "a%20b", "a+b", "ä"]


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_this_machine(scheme: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checkpoint_storage(f"{scheme}{tmp_path}/runs/{name}/train") == (f"{tmp_path}/runs/{name}/train", None)


def test_a_folder_from_where_the_job_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_storage("runs/r/train") == (f"{tmp_path}/runs/r/train", None)


@pytest.mark.parametrize("scheme", ["s3://", "s3a://"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_a_bucket(scheme: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    url = join(f"{scheme}bucket/runs", name, "train")
    path, store = checkpoint_storage(url)
    assert path == f"bucket/runs/{name}/train" == resolve(url)[1]
    assert store is not None
