"""A model file as MLflow serves it: the code in `pyfunc.py`, the weights beside it, what goes in and what comes out."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property
from PIL import Image

from freesolo.models.model_file import ModelFile

MODEL_NAME = "model.pt"
SHA256_TAG = "freesolo.sha256"

_INPUTS = Schema([ColSpec(DataType.binary, "image")])
_RLE = Object([Property("size", Array(DataType.long)), Property("counts", DataType.string)])
_OUTPUTS = {
    "backbone": Schema([ColSpec(Array(DataType.double), "embedding")]),
    "segmenter": Schema(
        [
            ColSpec(Array(_RLE), "masks"),
            ColSpec(Array(Array(DataType.double)), "boxes"),
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(Array(DataType.long), "category_ids"),
        ]
    ),
}
# What `freesolo.inference.answers` needs of other projects; the package itself goes with the model, as code.
_REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "pandas",
    "pydantic",
    "jaxtyping",
    "pycocotools",
    "pillow",
    "cykooz-resizer",
    "simplejpeg",
    "pyyaml",
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model file and how it is to be served.

    Attributes:
        file: The model file.
        model: What it holds.
        config: `{"predict": ...}`, PredictSettings as JSON, for a segmenter; empty for a backbone.
    """

    file: Path
    model: ModelFile
    config: dict[str, Any]

    def tags(self) -> dict[str, str]:
        """What people look for; with them also tells whether two versions are the same."""
        lineage = {f"lineage.{name}": _text(value) for name, value in self.model.lineage.items()}
        return {
            SHA256_TAG: self.model.sha256,
            "kind": self.model.kind,
            "backbone": str(self.model.settings["backbone"]),
            "served_with": json.dumps(self.config, sort_keys=True),
        } | lineage

    def save(self, folder: Path, flavoured: Model) -> None:
        """Write all of it as an MLflow model: weights, code, signature, example, requirements.

        Args:
            folder: Is made.
            flavoured: MLflow's description of the model, which is completed.
        """
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\.")  # it warns people of its own code
            # Only here, because it takes seconds to import, and warns too.
            from mlflow.pyfunc import save_model

            # The file's name in the version is always the same, whatever it was called here.
            shutil.copyfile(self.file, Path(scratch) / MODEL_NAME)
            save_model(
                str(folder),
                python_model=str(Path(__file__).with_name("pyfunc.py")),
                artifacts={"model": str(Path(scratch) / MODEL_NAME)},
                code_paths=[str(Path(__file__).parents[1])],  # the package
                model_config=self.config,
                signature=ModelSignature(inputs=_INPUTS, outputs=_OUTPUTS[self.model.kind]),
                input_example=pd.DataFrame({"image": [_example_photo()]}),
                pip_requirements=[f"{name}=={installed_version(name).split('+')[0]}" for name in _REQUIREMENTS],
                mlflow_model=flavoured,
            )


def _example_photo() -> bytes:
    """A small PNG: grey that brightens downwards."""
    rows = np.linspace(0, 255, 48).astype(np.uint8)
    png = BytesIO()
    Image.fromarray(np.broadcast_to(rows[:, None, None], (48, 64, 3)).copy()).save(png, "PNG")
    return png.getvalue()


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
