"""Bytes from elsewhere are never unpickled: every call that could is known, and is of what our own processes made."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Names whose import, and attributes whose use, can run what is in the bytes that they are given.
UNSAFE_MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "_pickle",
    "pandas.io.pickle",
    "jsonpickle",
}
UNSAFE_CALLS = {
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("numpy.load", "np.load", "pandas.read_pickle", "mlflow.pytorch.load_model", "eval", "exec", "compile"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "ray.cloudpickle.loads", "shutil.unpack_archive"),
}
# Each with why it may.
ALLOWED = {
    # Rows between Ray tasks of one job, in its own object store; they hold what `read_shard` has checked.
    ("freesolo/data/reading.py", "import pickle"),
    ("freesolo/data/ingest.py", "import pickle"),
    ("freesolo/data/ingest.py", "pickle.loads"),
    ("freesolo/inference/blocks.py", "import pickle"),
    ("freesolo/inference/blocks.py", "pickle.loads"),
    # Written, and read by a reader that finds no name but those of its own stand-ins (tests/unit/test_layouts.py).
    ("freesolo/models/array_pickle.py", "import pickle"),
    # The one reader of torch's files: weights_only, which a test of this file sees to.
    ("freesolo/models/torch_file.py", "torch.load"),
    # With a loader made of SafeLoader, and stricter.
    ("freesolo/config_file.py", "yaml.load"),
    # Pictures of a run that wait on this machine's own disk; np.load refuses pickles unless told otherwise.
    ("freesolo/tracking/mlflow_run.py", "np.load"),
}


def unsafe_uses(path: Path) -> Iterator[tuple[str, int, ast.Call | None]]:
    """Every use in a file that is on the list: what, in which line, and the call if it is one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            if name in UNSAFE_MODULES | UNSAFE_CALLS or name.partition(".")[0] in UNSAFE_MODULES:
                yield f"import {name}", node.lineno, None
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            yield ast.unparse(node.func), node.lineno, node
        elif isinstance(node, ast.Call) and any(
            keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
        ):
            yield "allow_pickle", node.lineno, node


SOURCES = sorted([*ROOT.glob("freesolo/**/*.py"), *ROOT.glob("jobs/*.py")])


def test_every_use_that_could_run_what_it_reads_is_known() -> None:
    assert len(SOURCES) > 80
    found = {(str(path.relative_to(ROOT)), what) for path in SOURCES for what, _, _ in unsafe_uses(path)}
    assert found - ALLOWED == set(), "read it by freesolo.models.torch_file, JSON or a safe loader instead"
    assert ALLOWED - found == set(), "no longer used: take it off the list"


def test_torch_reads_weights_only() -> None:
    (call,) = [call for _, _, call in unsafe_uses(ROOT / "freesolo/models/torch_file.py") if call is not None]
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["weights_only"] == "True"


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import pickle as p", "from torch import load"),
        *("torch.load(path)", "yaml.load(text, yaml.Loader)", "np.load(path, allow_pickle=True)", "eval(text)"),
        *("from cloudpickle import loads", "numpy.lib.format.read_array(f, allow_pickle=x)", "import dill.source"),
    ],
)
def test_a_new_one_would_be_seen(line: str, tmp_path: Path) -> None:
    path = tmp_path / "new.py"
    path.write_text(f"def f():\n    {line}\n", encoding="utf-8")
    assert list(unsafe_uses(path))
