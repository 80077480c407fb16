"""From shards to batches in the process that trains: photos read, decoded, cropped or resized, and put together.

The peer is what people use instead: `webdataset` and a DataLoader of PyTorch with a process a core. It does the very
same to each sample and to each batch, so what differs is who carries it from where to where. Each is timed as in the
midst of a training that waits for nothing but it, and has the machine for itself: the other is closed meanwhile. The
limit is libjpeg-turbo decoding the same photos on all cores, and nothing else.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from freesolo.data.label_records import ImageLabels, LabelledInstance
from freesolo.data.labels import LabelPlan, begin_label_set, finish_label_set, read_labels_of, write_label_file
from freesolo.data.order import Order, StreamState
from freesolo.data.pack import pack
from freesolo.data.shards import DatasetManifest, Sample, read_shard
from freesolo.data.views import ContrastiveView, Row, SegmentationView, View
from freesolo.ops.masks import boxes_xywh, encode_rle
from freesolo.settings import ResourceSettings, SegmentationViewSettings, ViewSettings
from tests.benchmarks.measure import Benchmark, Case
from tests.benchmarks.synthetic import ellipses

EMBEDDING_CHANNELS = 128
DIFFERENT_PHOTOS = 256
CORES = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is to do.

    Attributes:
        photos: In the data set, in two shards; they look like `DIFFERENT_PHOTOS` ones over and over.
        photo_size: Height and width in px.
        instances: In each photo.
        batch_size: Of DenseCL's batches; of SOLO's it is a fourth.
        batches: Of a turn.
        crop: DenseCL's views, in px.
        short_side: Of SOLO's photos, in px.
    """

    photos: int = 1024
    photo_size: tuple[int, int] = (480, 640)
    instances: int = 8
    batch_size: int = 64
    batches: int = 16
    crop: int = 224
    short_side: int = 640


TINY = Sizes(photos=8, photo_size=(48, 64), instances=2, batch_size=4, batches=2, crop=16, short_side=32)


@dataclass(frozen=True, slots=True)
class Stored:
    """A data set with a label set, in folders of this machine.

    Attributes:
        dataset: Of ours.
        labels: Of ours, joined to the data set.
        tars: The same photos and labels as the peer wants them.
        manifest: Of the data set.
    """

    dataset: str
    labels: str
    tars: str
    manifest: DatasetManifest

    @property
    def photos(self) -> list[bytes]:
        """The photos' files."""
        return [sample.image_bytes for shard in self.manifest.shards for sample in read_shard(self.dataset, shard)]


def cases(device: torch.device, sizes: Sizes = Sizes()) -> Iterator[Case[Any, Any]]:
    """DenseCL's path and SOLO's; the device has no part in them."""
    folder = tempfile.TemporaryDirectory(prefix="freesolo-benchmark-")
    atexit.register(folder.cleanup)
    stored = store(Path(folder.name), sizes)
    contrastive = ContrastiveView(ViewSettings(size=sizes.crop))
    segmentation = SegmentationView(
        SegmentationViewSettings(short_sides=(sizes.short_side,), long_side_max=3 * sizes.short_side),
        EMBEDDING_CHANNELS,
    )
    for name, view, batch_size in (
        (f"DenseCL: two crops of {sizes.crop} px", contrastive, sizes.batch_size),
        (f"SOLO: short side {sizes.short_side} px, {sizes.instances} masks", segmentation, sizes.batch_size // 4),
    ):
        count = sizes.batches * batch_size
        ours = Turns(partial(our_batches, stored, view, batch_size))
        peers = Turns(partial(peers_batches, stored, view, batch_size))
        with closing(ours), closing(peers):
            yield Case(
                name=f"{name}, {count} photos",
                peer_name="webdataset, DataLoader",
                ours=partial(ours.take, sizes.batches, instead_of=peers),
                peer=partial(peers.take, sizes.batches, instead_of=ours),
                assert_equal=partial(assert_batches, batch_size=batch_size),
                repeats=5,
                untimed=1,  # which bears the start
                limit=partial(
                    decode_alone, (stored.photos * -(-count // sizes.photos))[:count], instead_of=(ours, peers)
                ),
            )


class Turns:
    """Batches without an end, by one of two ways that take turns.

    Args:
        begin: Starts making them.
    """

    def __init__(self, begin: Callable[[], Generator[Any, None, None]]) -> None:
        self._begin = begin
        self._batches: Generator[Any, None, None] | None = None

    def take(self, count: int, *, instead_of: Turns) -> list[Any]:
        """The next ones, the other way's being closed."""
        instead_of.close()
        if self._batches is None:
            self._batches = self._begin()
        return [next(self._batches) for _ in range(count)]

    def close(self) -> None:
        """Stop making them."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


# --- the two ways ----------------------------------------------------------------------------------------------------


def our_batches(stored: Stored, view: View, batch_size: int) -> Generator[Any, None, None]:
    """As a train worker has them."""
    from freesolo.cluster import connect
    from freesolo.data.ingest import TrainingStream, configure_ray_data

    connect(ResourceSettings())
    configure_ray_data(cpus=float(CORES))
    stream = TrainingStream(
        dataset_url=stored.dataset,
        manifest=stored.manifest,
        labels=read_labels_of(stored.labels, stored.manifest) if isinstance(view, SegmentationView) else None,
        view=view,
        collate=collate_of(view),
        order=Order(tuple(shard.samples for shard in stored.manifest.shards), seed=0),
        batch_size=batch_size,
        max_bad_samples=0.0,
    )
    for batch in stream.batches(StreamState(), steps=10**9):
        yield batch.content


def peers_batches(stored: Stored, view: View, batch_size: int) -> Generator[Any, None, None]:
    """As a training with a DataLoader has them, labels beside the photos in the same shards."""
    import webdataset
    from torch.utils.data import DataLoader

    urls = sorted(str(path) for path in Path(stored.tars).glob("*.tar"))
    samples = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        .shuffle(stored.manifest.shards[0].samples)
        .map(partial(_row, view))
        .batched(batch_size, collation_fn=partial(collate_of(view), view), partial=False)
        .repeat()
    )
    # Spawned: a process with Ray's threads must not be forked.
    batches = iter(
        DataLoader(samples, batch_size=None, num_workers=CORES, prefetch_factor=2, multiprocessing_context="spawn")
    )
    try:
        yield from batches
    finally:
        # PyTorch's workers may abort while they end, of which its handler of signals would make an error of ours.
        with suppress(RuntimeError):
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _row(view: View, record: dict[str, Any]) -> Row:
    sample, labels = pickle.loads(record["pickle"])
    return view.row(replace(sample, image_bytes=record["jpg"]), labels, np.random.default_rng())


def collate_of(view: View) -> Callable[[Any, Sequence[Row]], Any]:
    """How the view's rows become a batch."""
    from freesolo.data.collate import collate_crops, collate_photos

    return collate_crops if isinstance(view, ContrastiveView) else collate_photos


def decode_alone(photos: Sequence[bytes], *, instead_of: Iterable[Turns]) -> None:
    """Photos whole, on all cores, both ways being closed; libjpeg-turbo does not hold Python's lock."""
    for turns in instead_of:
        turns.close()
    with ThreadPoolExecutor(CORES) as threads:
        for _ in threads.map(simplejpeg.decode_jpeg, photos):
            pass


def assert_batches(ours: list[Any], peers: list[Any], *, batch_size: int) -> None:
    """As many, as large, of the same types; which photos are in them is up to each side."""
    assert len(ours) == len(peers)
    for batch in (*ours, *peers):
        assert len(batch) == len(set(batch.image_ids)) == batch_size
    one, other = (_tensors(batches[0]) for batches in (ours, peers))
    assert [(tensor.dtype, tensor.dim()) for tensor in one] == [(tensor.dtype, tensor.dim()) for tensor in other]


def _tensors(batch: Any) -> list[torch.Tensor]:
    if hasattr(batch, "query"):
        return [batch.query, batch.key]
    return [batch.images.pixels, batch.instances.masks, batch.instances.embeddings]


# --- what they read --------------------------------------------------------------------------------------------------


def store(folder: Path, sizes: Sizes) -> Stored:
    """Photos with labels, in the forms that both sides want."""
    import webdataset

    generator = torch.Generator().manual_seed(0)
    photos = folder / "photos"
    photos.mkdir()
    different = [photo_file(*sizes.photo_size, generator) for _ in range(min(sizes.photos, DIFFERENT_PHOTOS))]
    for number in range(sizes.photos):
        (photos / f"{number:06d}.jpg").write_bytes(different[number % len(different)])
    dataset, labels, tars = (str(folder / name) for name in ("data", "labels", "tars"))
    manifest = pack(str(photos), dataset, samples_per_shard=max(1, sizes.photos // 2))
    begin_label_set(labels, LabelPlan(manifest.digest, dataset, "free-masks", {"weights": "none"}, {}, None))
    Path(tars).mkdir()
    for shard in manifest.shards:
        labelled = [(sample, labels_of(sample, sizes, generator)) for sample in read_shard(dataset, shard)]
        write_label_file(labels, shard.name, [record for _, record in labelled])
        with webdataset.TarWriter(f"{tars}/{shard.name}.tar") as tar:
            for sample, record in labelled:
                told = pickle.dumps((replace(sample, image_bytes=b""), record))
                tar.write({"__key__": sample.key, "jpg": sample.image_bytes, "pickle": told})
    finish_label_set(labels, manifest)
    return Stored(dataset, labels, tars, manifest)


def photo_file(height: int, width: int, generator: torch.Generator) -> bytes:
    """A JPEG with as much detail at each scale as photos have, and so about as many bytes and as much to decode.

    The power of photos' frequencies falls with their square (Field, 1987).
    """
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
    noise = torch.randn(3, height, width, generator=generator)
    noise[1:] = 0.9 * noise[:1] + 0.3 * noise[1:]  # channels of a photo resemble one another
    field = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
    pixels = (128 + 50 * field / field.std()).clamp(0, 255).byte()
    jpeg = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(jpeg, "JPEG", quality=88)
    return jpeg.getvalue()


def labels_of(sample: Sample, sizes: Sizes, generator: torch.Generator) -> ImageLabels:
    """Objects of many sizes."""
    height, width = sample.height, sample.width
    masks = ellipses(sizes.instances, height, width, generator, smallest=height / 10, largest=height * 0.9)
    embeddings = torch.randn(sizes.instances, EMBEDDING_CHANNELS, generator=generator).half().numpy()
    instances = tuple(
        LabelledInstance(0, rle, tuple(box), 0.9, 0, embedding)
        for rle, box, embedding in zip(encode_rle(masks), boxes_xywh(masks).tolist(), embeddings, strict=True)
    )
    return ImageLabels(sample.key, sample.image_id, sample.file_name, width, height, None, instances)


BENCHMARK = Benchmark(
    name="input_paths",
    inputs=f"photos of 480 x 640 px with 8 objects in shards on a disk, {CORES} cores; limit: decoding alone",
    cases=cases,
    needs=("ray", "webdataset"),
)
