from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from freesolo.provenance import code_version, git_commit, package_version


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package in a git repository, committed."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "Begin")
    return package


def test_a_checkout_has_its_commit(checkout: Path) -> None:
    assert git_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_tag_does_not_stand_for_the_commit(checkout: Path) -> None:
    git(checkout, "tag", "-a", "v1", "-m", "one")
    assert git_commit(checkout) == git(checkout, "rev-parse", "HEAD")


def test_changed_files_are_told(checkout: Path) -> None:
    (checkout / "__init__.py").write_text("changed = True")
    assert git_commit(checkout) == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_a_package_installed_below_a_checkout_is_not_of_it(checkout: Path) -> None:
    installed = checkout.parent / ".venv" / "site-packages" / "freesolo"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_commit(installed) is None


def test_outside_a_checkout_and_without_git_there_is_no_commit(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    assert git_commit(outside) is None
    monkeypatch.setenv("PATH", "")
    assert git_commit(checkout) is None


def test_without_a_commit_the_package_names_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freesolo.provenance.git_commit", lambda: None)
    assert code_version() == package_version()
    assert package_version().startswith("freesolo")
