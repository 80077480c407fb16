"""The parsers that read what comes from elsewhere: how to make an input for each, and what each may raise."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import random
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from freesolo.config import EvaluateJob, ExtractJob, Job, PackJob, PipelineJob, PredictJob, PretrainJob, TrainJob
from freesolo.config_file import load_config as load_job
from freesolo.data.coco import annotation_rle, sample_labels
from freesolo.data.documents import canonical_digest, parse_json
from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.label_table import LabelFileError, _table, decode_labels, encode_labels
from freesolo.data.labels import LabelFile, LabelManifest, LabelPlan, begin_label_set, check_label_set
from freesolo.data.order import Span, StreamState
from freesolo.data.photos import PhotoError, decode_photo, photo_size
from freesolo.data.shards import DatasetManifest, Sample, ShardError, ShardInfo, SkippedPhoto, read_shard, write_shard
from freesolo.data.sources import find_photos
from freesolo.errors import JobError, UsageError
from freesolo.models.array_pickle import write_array_pickle
from freesolo.models.layouts import to_torchvision
from freesolo.models.model_file import load_model, save_model
from freesolo.models.resnet import build_resnet
from freesolo.models.weights import load_backbone, read_state_dict
from freesolo.ops.mask_storage import check_rle_counts, rle_from_coco
from freesolo.ops.masks import decode_rle, encode_rle
from freesolo.settings import BoundsSettings, LoopSettings, OptimizerSettings, Settings
from freesolo.tracking.journal import Journal, read_journal
from freesolo.train.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint, take_snapshot
from freesolo.train.learner import Learner
from freesolo.train.loop import Progress
from tests.fuzz.mutation import mutate_bytes, mutate_json, write_json

ROOT = Path(__file__).parents[2]
BOUNDS = BoundsSettings(max_sample_bytes=2**20, max_pixels=2**20)
HEIGHT, WIDTH = 24, 32


@dataclass(frozen=True)
class Parser:
    """One that must stand any input.

    Attributes:
        make: An input.
        parse: Reads it, and what the rest of the system does first with what was read.
        refusals: What it may raise, as its docstring says.
    """

    make: Callable[[random.Random], bytes]
    parse: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]


@functools.cache
def folder() -> Path:
    """Of this process alone; its files are each input's in turn."""
    return Path(tempfile.mkdtemp(prefix="freesolo-fuzz-"))


def _bytes_of(seeds: Callable[[], Sequence[bytes]]) -> Callable[[random.Random], bytes]:
    known = functools.cache(seeds)
    return lambda source: mutate_bytes(known(), source)


def _json_of(document: Callable[[], Any]) -> Callable[[random.Random], bytes]:
    """Changes of a document's values, and of its text."""
    known = functools.cache(document)

    def make(source: random.Random) -> bytes:
        if source.random() < 0.7:
            return write_json(mutate_json(known(), source))
        return mutate_bytes([json.dumps(known()).encode()], source)

    return make


# --- photos ---------------------------------------------------------------------------------------------------------


@functools.cache
def photos() -> tuple[bytes, ...]:
    """A small photo in every format that is read, and in the odder forms of each."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    picture = Image.fromarray(np.stack((rows * 10, columns * 7, (rows * columns) % 256), axis=2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms: tuple[tuple[Image.Image, str, dict[str, Any]], ...] = (
        (picture, "JPEG", {"quality": 80, "exif": exif}),
        (picture, "JPEG", {"progressive": True, "restart_marker_blocks": 2}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture.convert("L"), "JPEG", {}),
        (picture, "PNG", {"exif": exif}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (picture.convert("I;16"), "PNG", {}),
        (picture.convert("RGBA"), "WEBP", {"lossless": True}),
        (picture, "WEBP", {"save_all": True, "append_images": [picture.rotate(90)], "exif": exif}),
        (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}),
        (picture, "BMP", {}),
        (picture.convert("1"), "BMP", {}),
        (picture, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        (picture, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (picture.convert("F"), "TIFF", {}),
        (picture, "AVIF", {"quality": 50}),
    )
    return tuple(_encoded(image, kind, options) for image, kind, options in forms)


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _make_photo(source: random.Random) -> bytes:
    data = mutate_bytes(photos(), source)
    return _with_png_checksums(data) if data.startswith(b"\x89PNG") and source.random() < 0.8 else data


def _with_png_checksums(data: bytes) -> bytes:
    fixed, place = bytearray(data), 8
    while place + 8 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, place)
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


def _parse_photo(data: bytes) -> object:
    height, width = photo_size(data, max_pixels=BOUNDS.max_pixels)
    assert height * width <= BOUNDS.max_pixels
    pixels = decode_photo(data, max_pixels=BOUNDS.max_pixels)
    assert pixels.shape == (height, width, 3)
    decode_photo(data, size=(height, width), min_short_side=8)
    return pixels


# --- shards ---------------------------------------------------------------------------------------------------------


ANNOTATION = {
    "id": 5,
    "image_id": 1,
    "category_id": 1,
    "bbox": [1, 2, 9, 8],
    "area": 60.5,
    "iscrowd": 0,
    "segmentation": [[1, 2, 10, 2, 10, 10, 1, 10]],
}
RUNS = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}


def _annotations() -> list[dict[str, Any]]:
    text = rle_from_coco(RUNS, HEIGHT, WIDTH)
    return [ANNOTATION, ANNOTATION | {"id": 6, "segmentation": RUNS}, {"id": 7, "segmentation": text, "iscrowd": 1}]


def samples() -> list[Sample]:
    """Three, one of them annotated."""
    annotations = (tuple(_annotations()), (), ())
    return [
        Sample(f"{i}", photos()[4 * i], i, f"été/{i}.jpg", WIDTH, HEIGHT, each) for i, each in enumerate(annotations)
    ]


@functools.cache
def _shards() -> tuple[bytes, ...]:
    url = str(folder() / "seeds")
    written = (write_shard(url, "shard-000000", samples()), write_shard(url, "shard-000001", samples()[:1]))
    odd = io.BytesIO()
    with tarfile.open(fileobj=odd, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "é"}) as tar:
        for name, kind in (("../x.json", tarfile.REGTYPE), ("1.jpg", tarfile.SYMTYPE), ("1.json", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mtime = kind, "/etc/passwd", 0.5  # type: ignore[assignment]
            tar.addfile(member)
    gnu = io.BytesIO()
    with tarfile.open(fileobj=gnu, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * 150 + ".json"))
    return (*(Path(url, f"{shard.name}.tar").read_bytes() for shard in written), odd.getvalue(), gnu.getvalue())


def _make_shard(source: random.Random) -> bytes:
    data = mutate_bytes(_shards(), source)
    if source.random() < 0.3:
        data = _with_header(data, source)
    return _with_tar_checksums(data) if source.random() < 0.8 else data


def _with_header(data: bytes, source: random.Random) -> bytes:
    """A header's field becomes another: name, size, type, link or prefix."""
    headers = [place for place in range(0, len(data) - 511, 512) if data[place + 257 : place + 262] == b"ustar"]
    if not headers:
        return data
    fixed, place = bytearray(data), source.choice(headers)
    offset, value = source.choice(
        (
            *(
                (0, name)
                for name in (b"../../x.json", b"/etc/x.json", b"0.json", b".json", b"a/0.jpg", b"0.a.jpg", b"\xff")
            ),
            *(
                (124, size)
                for size in (
                    b"77777777777",
                    b"\x80" + b"\0" * 6 + b"\x7f" * 5,
                    b"\x80\0\0\0\x3f" + b"\0" * 7,
                    b"\xff" * 12,
                    b"-1",
                    b"",
                )
            ),
            *(
                (156, kind)
                for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"K", b"L", b"S", b"g", b"x", b"\0", b"V")
            ),
            (345, b"../.."),
        )
    )
    fixed[place + offset : place + offset + len(value)] = value
    if offset == 0:
        fixed[place + len(value)] = 0
    return bytes(fixed)


def _with_tar_checksums(data: bytes) -> bytes:
    fixed = bytearray(data)
    for place in range(0, len(fixed) - 511, 512):
        if fixed[place + 257 : place + 262] == b"ustar":
            fixed[place + 148 : place + 156] = b" " * 8
            fixed[place + 148 : place + 156] = b"%06o\0 " % sum(fixed[place : place + 512])
    return bytes(fixed)


def _parse_shard(data: bytes) -> object:
    url = folder() / "shards"
    url.mkdir(exist_ok=True)
    (url / "shard-000000.tar").write_bytes(data)
    found: list[Sample] = []
    try:
        # The manifest is the attacker's, too: all that it can know of the shard is right.
        for sample in read_shard(
            str(url), ShardInfo("shard-000000", 3, len(data), sha256(data).hexdigest()), bounds=BOUNDS
        ):
            found.append(sample)
    finally:
        for sample in found:
            _use_sample(sample)
    return found


def _use_sample(sample: Sample) -> None:
    assert sample.key.replace("_", "").replace("-", "").isalnum()
    assert sample.error is not None or sample.width * sample.height <= BOUNDS.max_pixels
    assert len(sample.image_bytes) <= BOUNDS.max_sample_bytes
    sample_labels(sample)


def _record() -> Any:
    return {"image_id": 1, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT, "annotations": _annotations()}


def _parse_record(data: bytes) -> object:
    """A sample's JSON, in a shard that is whole."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in (("1.jpg", photos()[0]), ("1.json", data)):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    url = folder() / "records"
    url.mkdir(exist_ok=True)
    content = stream.getvalue()
    (url / "shard-000000.tar").write_bytes(content)
    info = ShardInfo("shard-000000", 1, len(content), sha256(content).hexdigest())
    (sample,) = read_shard(str(url), info, bounds=BOUNDS)
    _use_sample(sample)
    return sample


# --- manifests ------------------------------------------------------------------------------------------------------


def _dataset() -> DatasetManifest:
    shards = (ShardInfo("shard-000000", 3, 10240, "a" * 64), ShardInfo("shard-000001", 2, 5120, "b" * 64))
    return DatasetManifest(1, shards, True, ({"id": 1, "name": "chat"},), (SkippedPhoto("broken.jpg", "truncated"),))


PLAN = LabelPlan("c" * 64, "s3://photos/set", "free-masks", {"weights": "w", "sha256": "d" * 64}, {"a": {"b": 1}}, None)


def _label_manifest() -> LabelManifest:
    return LabelManifest(1, PLAN, (LabelFile("shard-000000", 3, 9, 1, 999, "e" * 64),))


def _parse_plan(data: bytes) -> object:
    url = folder() / "labels"
    url.mkdir(exist_ok=True)
    (url / "plan.json").write_bytes(data)
    return check_label_set(str(url), PLAN)


def _plan_document() -> Any:
    url = folder() / "plan"
    begin_label_set(str(url), PLAN)
    return json.loads((url / "plan.json").read_bytes())


# --- label files ----------------------------------------------------------------------------------------------------


def masks(count: int, seed: int = 0) -> torch.Tensor:
    """Some masks, of blobs and of noise."""
    drawn = np.random.default_rng(seed).random((count, HEIGHT, WIDTH)) < 0.3
    drawn[::2, 3:9, 4:20] = True
    return torch.from_numpy(drawn)


def label_records() -> list[ImageLabels]:
    """Of four images: one with instances, one without, one unreadable, one with many."""
    found = [
        LabelledInstance(i + 1, rle, (1.0, 2.0, 3.0, 4.0), 0.5, 0, np.arange(4, dtype=np.float16))
        for i, rle in enumerate(encode_rle(masks(12)))
    ]
    cuts = ((0, 2), (2, 2), (2, 2), (2, 12))
    return [
        ImageLabels(f"{i}", i, f"{i}.jpg", WIDTH, HEIGHT, "truncated" if i == 2 else None, tuple(found[start:stop]))
        for i, (start, stop) in enumerate(cuts)
    ]


@functools.cache
def _label_files() -> tuple[bytes, ...]:
    plain = io.BytesIO()  # without checksums of pages, as an attacker would write it
    pq.write_table(_table(label_records()), plain, compression="none", use_dictionary=False)
    small = io.BytesIO()
    pq.write_table(_table(label_records()), small, compression="snappy", row_group_size=2, data_page_version="2.0")
    return encode_labels(label_records()), plain.getvalue(), small.getvalue(), encode_labels([])


def _parse_label_file(data: bytes) -> object:
    records = decode_labels(data, "here")
    for record in records:
        _use_masks([instance.rle for instance in record.instances], record.height, record.width)
    return records


def _use_masks(rles: list[dict[str, Any]], height: int, width: int) -> None:
    """All that the system asks pycocotools' C code."""
    if not rles or height * width > BOUNDS.max_pixels:
        return
    decoded = decode_rle(rles, height, width)
    areas = coco_mask.area(rles)
    assert areas.tolist() == decoded.flatten(1).sum(dim=1).tolist()
    coco_mask.toBbox(rles)
    coco_mask.iou(rles, rles, [0] * len(rles))
    coco_mask.merge(rles)


# --- COCO -----------------------------------------------------------------------------------------------------------


@functools.cache
def _counts() -> tuple[bytes, ...]:
    return tuple(rle["counts"].encode() for rle in encode_rle(masks(6)))


def _make_counts(source: random.Random) -> bytes:
    if source.random() < 0.1:
        (rle,) = encode_rle(masks(1, source.randrange(2**32)))
        return bytes(rle["counts"], "ascii")
    if source.random() < 0.5:
        return mutate_bytes(_counts(), source)
    # Of the alphabet, and with sums that are nearly right: what gets furthest.
    data = bytearray(source.choice(_counts()))
    for _ in range(source.choice((1, 2, 4))):
        place = source.randrange(len(data))
        data[place] = source.choice((48 + source.randrange(64), (data[place] - 48 ^ 1) + 48, 48, 48 + 32, 48 + 16))
    return bytes(data)


def _parse_counts(data: bytes) -> object:
    rle = rle_from_coco({"size": [HEIGHT, WIDTH], "counts": data}, HEIGHT, WIDTH)
    check_rle_counts([data], [HEIGHT * WIDTH])
    _use_masks([rle], HEIGHT, WIDTH)
    return rle


def _parse_annotation(data: bytes) -> object:
    found = parse_json(data)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError("not annotations")
    rles = [annotation_rle(each, HEIGHT, WIDTH) for each in found]
    _use_masks(rles, HEIGHT, WIDTH)
    return rles


def _coco_document() -> Any:
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": _annotations()[:2],
    }


def _parse_coco(data: bytes) -> object:
    path = folder() / "coco.json"
    path.write_bytes(data)
    collection = find_photos(str(path), images=str(folder()))
    for photo in collection.photos:
        assert photo.url.startswith(f"{folder()}/")
        assert ".." not in photo.url.split("/")
        for annotation in photo.annotations:
            try:
                annotation_rle(annotation, HEIGHT, WIDTH)
            except ValueError:
                continue
    return collection


# --- models and runs ------------------------------------------------------------------------------------------------


@functools.cache
def _model_files() -> tuple[bytes, ...]:
    path = folder() / "seed.pt"
    network = build_resnet("resnet18").conv1.state_dict()
    save_model(path, "backbone", {"backbone": "resnet18"}, network, {"labels_digest": None})
    old = io.BytesIO()
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2, 3)}}, old, _use_new_zipfile_serialization=False)
    plain = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(3), "b": torch.zeros(1).expand(5)}, "step": 3}, plain)
    return path.read_bytes(), old.getvalue(), plain.getvalue()


@functools.cache
def _weight_files() -> tuple[bytes, ...]:
    path = folder() / "seed.pkl"
    arrays = {"stem.conv1.weight": np.ones((2, 3), np.float32), "stem.conv1.norm.bias": np.zeros(2, np.float16)}
    write_array_pickle({"model": arrays, "__author__": "here", "matching_heuristics": True}, path)
    return *_model_files(), path.read_bytes(), pickle.dumps({"conv1_w": arrays["stem.conv1.weight"]}, protocol=4)


def _parse_model_file(data: bytes) -> object:
    path = folder() / "model.pt"
    path.write_bytes(data)
    return load_model(path, "backbone", backbone="resnet18")


def _parse_weights(data: bytes) -> object:
    path = folder() / "weights.pth"
    path.write_bytes(data)
    tensors = read_state_dict(path)
    with contextlib.suppress(UsageError, ValueError):  # no seed is a whole network
        load_backbone(_network(), to_torchvision(tensors), source="here")
    return tensors


_network = functools.cache(functools.partial(build_resnet, "resnet18"))


class _Small:
    """The smallest task that a learner takes."""

    def __init__(self) -> None:
        self.module = nn.Linear(3, 2)

    def prepare(self, batch: Any, generator: torch.Generator) -> Any:
        return batch

    def after_step(self, step: int) -> None:
        return


def _learner() -> Learner:
    settings = OptimizerSettings(learning_rate=0.1)
    return Learner(_Small(), LoopSettings(steps=1, batch_size=1, ema_decay=0.9), settings, torch.device("cpu"))


@functools.cache
def _checkpoint() -> tuple[Path, bytes, dict[str, Any]]:
    """A checkpoint's folder, and the weights and the progress in it as they were saved."""
    where = folder() / "checkpoint"
    where.mkdir()
    stream = StreamState(2, (Span(0, 3, 9), Span(1, 0, 12)))
    save_checkpoint(where, take_snapshot(_learner(), Progress(7, stream, 1)), Settings(), "abc")
    return where, (where / "learner.pt").read_bytes(), json.loads((where / "progress.json").read_bytes())


_make_any_progress = _json_of(lambda: _checkpoint()[2])


def _make_progress(source: random.Random) -> bytes:
    data = _make_any_progress(source)
    try:
        return write_json(_with_digest(json.loads(data))) if source.random() < 0.9 else data
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def _with_digest(record: dict[str, Any]) -> dict[str, Any]:
    """Whoever alters a checkpoint can make its digest right."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return rest | {"digest": canonical_digest(rest)}


def _parse_progress(data: bytes) -> object:
    where, weights, _ = _checkpoint()
    (where / "learner.pt").write_bytes(weights)
    (where / "progress.json").write_bytes(data)
    return load_checkpoint(where, _learner())


def _parse_learner(data: bytes) -> object:
    where, _, progress = _checkpoint()
    (where / "learner.pt").write_bytes(data)
    record = _with_digest(progress | {"sha256": {"learner.pt": sha256(data).hexdigest()}})
    (where / "progress.json").write_bytes(write_json(record))
    return load_checkpoint(where, _learner())


def _journals() -> list[bytes]:
    journal = Journal(str(folder() / "run"))
    for step in range(3):
        journal.append(step, {"loss": 0.5, "rate": float("nan")})
    journal.close()
    return [(folder() / "run" / "metrics.jsonl").read_bytes()]


def _parse_journal(data: bytes) -> object:
    url = folder() / "journal"
    url.mkdir(exist_ok=True)
    (url / "metrics.jsonl").write_bytes(data)
    return read_journal(str(url))


_JOBS: dict[str, type[Job]] = {
    "pretrain": PretrainJob,
    "extract": ExtractJob,
    "train": TrainJob,
    "predict": PredictJob,
    "evaluate": EvaluateJob,
    "pipeline": PipelineJob,
    "pack": PackJob,
}
_YAML_TRICKS = (
    b"a: &a [x, x]\nb: *a\n",
    b"? [a, b]\n: c\n",
    b"!!python/object/apply:os.system ['true']\n",
    b"2001-99-99\n",
    b"1:99:99\n",
    b"!!binary 'a'\n",
    b"0x" + b"f" * 500,
    b"1" * 5000,
    b"- " * 100,
    b"{" * 100,
    b"<<: {a: 1}\n",
    b"!!set {a, b}\n",
    b"1e-4\n",
    b".nan\n",
    b".inf\n",
    b"--- a\n--- b\n",
)


def _make_config(source: random.Random) -> bytes:
    """First a byte that says whose job's it is."""
    kind = source.randrange(len(_JOBS))
    name = list(_JOBS)[kind]
    seeds = [path.read_bytes() for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
    data = mutate_bytes(seeds, source)
    if source.random() < 0.4:
        lines = data.split(b"\n")
        place = source.randrange(len(lines))
        key, colon, _ = lines[place].partition(b":")
        lines[place] = key + colon + b" " + source.choice(_YAML_TRICKS)
        data = b"\n".join(lines)
    return bytes([kind]) + data


def _parse_config(data: bytes) -> object:
    path = folder() / "config.yaml"
    path.write_bytes(data[1:])
    return load_job(list(_JOBS.values())[data[0] % len(_JOBS) if data else 0], path)


def _overrides() -> list[bytes]:
    return [
        b"train.loop.steps=3",
        b"tracking.uri=off",
        b"train.views.short_sides=[32, 64]",
        b"labels={a: b}",
        *_YAML_TRICKS,
    ]


def _parse_override(data: bytes) -> object:
    return load_job(
        TrainJob, ROOT / "configs/train/solo_r50.yaml", ["dataset=d", data.decode(errors="surrogateescape")]
    )


PARSERS: dict[str, Parser] = {
    "shard": Parser(_make_shard, _parse_shard, (ShardError,)),
    "sample record": Parser(_json_of(_record), _parse_record, (ShardError,)),
    "photo": Parser(_make_photo, _parse_photo, (PhotoError,)),
    "data set manifest": Parser(
        _json_of(lambda: json.loads(_dataset().to_json())), DatasetManifest.from_json, (UsageError,)
    ),
    "label manifest": Parser(
        _json_of(lambda: json.loads(_label_manifest().to_json())), LabelManifest.from_json, (UsageError,)
    ),
    "label plan": Parser(_json_of(_plan_document), _parse_plan, (UsageError,)),
    "label file": Parser(_bytes_of(_label_files), _parse_label_file, (LabelFileError,)),
    "run lengths": Parser(_make_counts, _parse_counts, (ValueError,)),
    "annotation": Parser(_json_of(_annotations), _parse_annotation, (ValueError,)),
    "COCO JSON": Parser(_json_of(_coco_document), _parse_coco, (UsageError,)),
    "model file": Parser(_bytes_of(_model_files), _parse_model_file, (UsageError,)),
    "published weights": Parser(_bytes_of(_weight_files), _parse_weights, (UsageError,)),
    "checkpoint's progress": Parser(_make_progress, _parse_progress, (DamagedCheckpointError, UsageError)),
    "checkpoint's weights": Parser(
        _bytes_of(lambda: [_checkpoint()[1]]), _parse_learner, (DamagedCheckpointError, UsageError)
    ),
    "metrics journal": Parser(_bytes_of(_journals), _parse_journal, (JobError,)),
    "configuration": Parser(_make_config, _parse_config, (UsageError,)),
    "override": Parser(_bytes_of(_overrides), _parse_override, (UsageError,)),
}
