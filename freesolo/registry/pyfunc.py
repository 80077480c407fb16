"""The model that the registry serves, logged as code: photos in, what was found in them out.

MLflow runs this file by itself, not as a module of the package; nothing else should import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from freesolo.inference.answers import answer_photos, open_model


class PhotoModel(PythonModel):
    """A segmenter or a backbone, told apart by its model file."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights, which lie beside the code."""
        self._model = open_model(Path(context.artifacts["model"]), context.model_config)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One answer a row of the binary column `image`."""
        del context, params
        return answer_photos(self._model, list(model_input["image"]))


set_model(PhotoModel())
