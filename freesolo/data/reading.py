"""What one read task reads: a piece of a window of shards, with the labels of its samples.

A reader knows its own shards and label files and nothing else of the data set, however large that is.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from freesolo.data.label_records import ImageLabels
from freesolo.data.labels import LabelFile, LabelFileError, read_label_file
from freesolo.data.order import Piece
from freesolo.data.shards import Sample, ShardError, ShardInfo, read_shard
from freesolo.settings import BoundsSettings

SAMPLES_PER_TABLE = 16


@dataclass(frozen=True, slots=True)
class PieceReader:
    """Reads a piece; it is pickled for the task that does.

    Attributes:
        dataset_url: Of the data set.
        shards: Of the piece's window, in its order.
        labels_url: Of the label set to join; None: samples come without labels.
        label_files: Of the same shards; empty without a label set.
        piece: Which samples, in which order.
        bounds: A larger sample is a bad one.
    """

    dataset_url: str
    shards: tuple[ShardInfo, ...]
    labels_url: str | None
    label_files: tuple[LabelFile, ...]
    piece: Piece
    bounds: BoundsSettings

    def tables(self) -> Iterator[pa.Table]:
        """The samples with their labels, pickled, in the piece's order.

        What cannot be read comes as an `error` in its place, and the reader of the stream decides. Its `key` is the
        sample's, or the shard's name where the sample was not reached.
        """
        window = self.piece.window
        places = window.permutation()[self.piece.start : self.piece.stop].tolist()
        records: dict[int, _Record] = {}
        first = 0
        for number, shard in enumerate(self.shards):
            wanted = [place - first for place in places if first <= place < first + shard.samples]
            found = self._members(number, wanted) if wanted else {}
            records |= {first + member: record for member, record in found.items()}
            first += shard.samples
        seed = [window.seed, window.epoch]
        for start in range(0, len(places), SAMPLES_PER_TABLE):
            block = [records[place] for place in places[start : start + SAMPLES_PER_TABLE]]
            yield pa.table(
                {
                    "key": pa.array([record.key for record in block], pa.string()),
                    "payload": pa.array([record.payload for record in block], pa.binary()),
                    "error": pa.array([record.error for record in block], pa.string()),
                    "seed": pa.array([seed] * len(block), pa.list_(pa.int64())),
                }
            )

    def _members(self, number: int, wanted: Sequence[int]) -> dict[int, _Record]:
        """Some samples of a shard, each with its labels, or the reason why it cannot be used.

        A shard that ends early costs what is missing, one that was altered costs all: nobody can tell which of its
        samples are as they were. A label file that cannot be read, or is of other images, costs its shard's samples,
        and a record that it lacks, because the shard was cut short when it was labelled, costs one: a data set's
        annotations never stand in for the labels that a training was asked to use.
        """
        shard = self.shards[number]
        found: dict[int, _Record] = {}
        chosen, keys, read = set(wanted), set(), 0
        try:
            labels = self._labels(number)
            for member, sample in enumerate(read_shard(self.dataset_url, shard, bounds=self.bounds)):
                read += 1
                keys.add(sample.key)
                if member in chosen:
                    found[member] = self._record(sample, labels, shard.name)
            unknown = sorted(labels.keys() - keys) if labels is not None else []
            if unknown:
                label_file = f"{shard.name} of {self.labels_url}"
                raise LabelFileError(f"{label_file} has labels of {len(unknown)} unknown images, first: {unknown[0]}")
        except (ShardError, LabelFileError) as error:
            lost = _Record(shard.name, error=str(error))
            kept = found if read < shard.samples else {}
            return {member: kept.get(member, lost) for member in wanted}
        return found

    def _labels(self, number: int) -> dict[str, ImageLabels] | None:
        if self.labels_url is None:
            return None
        records = read_label_file(self.labels_url, self.label_files[number])
        return {labels.key: labels for labels in records if not labels.is_lost}

    def _record(self, sample: Sample, labels: dict[str, ImageLabels] | None, shard_name: str) -> _Record:
        if sample.error is not None:
            return _Record(sample.key, error=sample.error)
        if labels is None:
            return _Record(sample.key, pickle.dumps((sample, None)))
        record, label_file = labels.get(sample.key), f"{shard_name} of {self.labels_url}"
        if record is None:
            return _Record(sample.key, error=f"no record in {label_file}")
        if record.error is None and (record.height, record.width) != (sample.height, sample.width):
            return _Record(sample.key, error=f"{record.width} x {record.height} pixels in {label_file}")
        return _Record(sample.key, pickle.dumps((sample, record)))


@dataclass(frozen=True, slots=True)
class _Record:
    """A sample and its labels, pickled for the next task, or why they cannot be used."""

    key: str
    payload: bytes | None = None
    error: str | None = None
