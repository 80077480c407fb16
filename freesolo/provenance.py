"""Which code made a result."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_GIT_SECONDS = 10.0


def git_commit(folder: Path | None = None) -> str | None:
    """The commit that this package is checked out at, with `-dirty` where files differ from it.

    Args:
        folder: The package's folder; default: the one that this module is in.

    Returns:
        None where the package is not part of a git checkout (installed, or copied into an image), or git is missing.
        A package that is merely installed below someone's checkout, as in a virtual environment, is not part of it.
    """
    package = Path(__file__).parent if folder is None else folder
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def code_version() -> str:
    """The git commit, or, outside a checkout, the package's version as `freesolo 0.1.0`."""
    return git_commit() or package_version()


def package_version() -> str:
    """The installed package's version, as `freesolo 0.1.0`."""
    try:
        return f"freesolo {version('freesolo')}"
    except PackageNotFoundError:
        return "freesolo, neither installed nor checked out"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
