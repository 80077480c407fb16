"""The best checkpoint of a run, kept beside the last ones: Ray keeps the one kind or the other.

    <stage>/best.json          which it is, and how good; written when all of it is there
    <stage>/best/step-.../     the checkpoint

The best is the one with the lowest mean loss since the checkpoint before it. Where losses are warmed up, early ones are
lower for what they lack.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

from freesolo.data.files import atomic_writer, exists, join, list_files, read_bytes, remove_file, write_atomic
from freesolo.errors import JobError, UsageError

_LOG = logging.getLogger(__name__)


class BestCheckpoint:
    """Uploads checkpoints that are better than all before.

    Args:
        stage_url: Folder of the stage.
    """

    def __init__(self, stage_url: str) -> None:
        self._stage_url = stage_url
        self._record_url = join(stage_url, "best.json")
        record = json.loads(read_bytes(self._record_url)) if exists(self._record_url) else {}
        self._lowest: float = record.get("loss", math.inf)

    def offer(self, folder: Path, name: str, loss: float) -> None:
        """Keep a checkpoint if it is the best. One that cannot be kept is told of: training has not failed for it.

        Args:
            folder: Its files.
            name: Of the checkpoint.
            loss: Lower is better.
        """
        if loss >= self._lowest:
            return
        self._lowest = loss
        try:
            self._upload(folder, name, loss)
        except (UsageError, JobError) as error:
            _LOG.warning("the best checkpoint was not kept: %s", error)

    def _upload(self, folder: Path, name: str, loss: float) -> None:
        for file in folder.iterdir():
            with file.open("rb") as source, atomic_writer(join(self._stage_url, "best", name, file.name)) as target:
                shutil.copyfileobj(source, target)
        record = {"checkpoint": f"best/{name}", "loss": loss}
        write_atomic(self._record_url, json.dumps(record).encode())
        for other in list_files(join(self._stage_url, "best")):
            if not other.startswith(f"{name}/"):
                remove_file(join(self._stage_url, "best", other))
