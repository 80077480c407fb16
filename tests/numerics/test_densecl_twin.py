"""DenseCL against a slow twin in Python's own arithmetic, and two workers against one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from freesolo.densecl.loss import dense_loss, info_nce, match_cells
from freesolo.densecl.model import DenseCL
from freesolo.errors import UsageError
from freesolo.ops.collectives import gather_from_all_workers, rank, sum_over_workers, world_size
from freesolo.settings import DenseCLModelSettings
from freesolo.types import ViewPair
from tests.workers import on_workers

Vector = list[float]


# --- the twin: arXiv:2011.09157 sec. 3, a line an equation ------------------------------------------------------------


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    length = math.sqrt(dot(a, a))
    return [x / length for x in a]


def mean(vectors: list[Vector]) -> Vector:
    return [math.fsum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def project(layers: list[tuple[list[Vector], Vector]], vector: Vector) -> Vector:
    """Two linear layers with a ReLU between them; a 1x1 convolution is one at each cell."""
    (weight, bias), (weight2, bias2) = layers
    hidden = [max(0.0, dot(row, vector) + b) for row, b in zip(weight, bias, strict=True)]
    return [dot(row, hidden) + b for row, b in zip(weight2, bias2, strict=True)]


def contrast(query: Vector, positive: Vector, negatives: list[Vector], temperature: float) -> float:
    """-log exp(q.k+/t) / (exp(q.k+/t) + sum over k- of exp(q.k-/t)), eq. 1 and 2."""
    numerator = math.exp(dot(query, positive) / temperature)
    return -math.log(
        numerator / (numerator + math.fsum(math.exp(dot(query, negative) / temperature) for negative in negatives))
    )


def encode(head_layers: dict[str, list[tuple[list[Vector], Vector]]], cells: list[Vector]):
    """Normalised: features of the cells, the image's projection, the cells' projections, and their mean's."""
    image = project(head_layers["global_head"], mean(cells))
    dense = [project(head_layers["dense_head"], cell) for cell in cells]
    return [unit(cell) for cell in cells], unit(image), [unit(vector) for vector in dense], unit(mean(dense))


def layers_of(encoder: torch.nn.Module) -> dict[str, list[tuple[list[Vector], Vector]]]:
    return {
        name: [(layer.weight.flatten(1).tolist(), layer.bias.tolist()) for layer in (head[0], head[2])]
        for name, head in (("global_head", encoder.neck.global_head), ("dense_head", encoder.neck.dense_head))
    }


def cells_of(encoder: torch.nn.Module, images: Tensor) -> list[list[Vector]]:
    """The stage-5 map of each image, a list of its cells' vectors, row by row."""
    features = encoder.backbone(images).c5
    return [[image[:, i, j].tolist() for i in range(2) for j in range(2)] for image in features]


def settings(**changes: object) -> DenseCLModelSettings:
    small = {"backbone": "resnet18", "hidden_channels": 6, "projection_channels": 4, "queue_length": 8}
    return DenseCLModelSettings(**{**small, **changes})


def model(**changes: object) -> DenseCL:
    network = DenseCL(settings(**changes)).initialise(torch.Generator().manual_seed(0))
    for parameter in network.key.parameters():  # two encoders that differ, as they do after the first step
        parameter.data.mul_(1.1)
    return network


def views(batch: int, seed: int = 0, size: int = 64) -> ViewPair:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, 3, size, size, generator=generator)
    return ViewPair(query, key, tuple(range(batch)))


def test_losses_and_queues_equal_the_twins():
    network = model(dense_loss_weight=0.3).eval()
    batch, temperature = views(2), 0.2
    with torch.no_grad():
        query_cells, key_cells = cells_of(network.query, batch.query), cells_of(network.key, batch.key)
    queries = [encode(layers_of(network.query), cells) for cells in query_cells]
    keys = [encode(layers_of(network.key), cells) for cells in key_cells]
    global_queue, dense_queue = network.global_queue.tolist(), network.dense_queue.tolist()

    global_terms, dense_terms = [], []
    for (q_features, q_image, q_dense, _), (k_features, k_image, k_dense, _) in zip(queries, keys, strict=True):
        global_terms.append(contrast(q_image, k_image, global_queue, temperature))
        for feature, vector in zip(q_features, q_dense, strict=True):
            similarities = [dot(feature, other) for other in k_features]
            positive = k_dense[similarities.index(max(similarities))]
            dense_terms.append(contrast(vector, positive, dense_queue, temperature))

    losses = network(batch, 0)
    assert losses["global"].item() == pytest.approx(0.7 * math.fsum(global_terms) / 2, rel=1e-5)
    assert losses["dense"].item() == pytest.approx(0.3 * math.fsum(dense_terms) / 8, rel=1e-5)
    for row, (_, image, _, pooled) in enumerate(keys):
        assert network.global_queue[row].tolist() == pytest.approx(image, abs=1e-5)
        assert network.dense_queue[row].tolist() == pytest.approx(pooled, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_losses_equal_the_twins_in_double_precision(temperature):
    generator = torch.Generator().manual_seed(3)
    features_q, features_k = torch.nn.functional.normalize(
        torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64), dim=2
    )
    query, key = torch.nn.functional.normalize(torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64), dim=2)
    queue = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1)
    matches, terms = [], []
    for image in range(3):
        for i in range(5):
            similarities = [dot(features_q[image, :, i].tolist(), features_k[image, :, j].tolist()) for j in range(5)]
            matches.append(similarities.index(max(similarities)))
            terms.append(
                contrast(query[image, :, i].tolist(), key[image, :, matches[-1]].tolist(), queue.tolist(), temperature)
            )
    found = match_cells(features_q, features_k)
    assert found.flatten().tolist() == matches
    loss = dense_loss(query, key, found, queue, temperature)
    assert loss.item() == pytest.approx(math.fsum(terms) / 15, rel=1e-6)
    image_terms = [
        contrast(query[b, :, 0].tolist(), key[b, :, 0].tolist(), queue.tolist(), temperature) for b in range(3)
    ]
    assert info_nce(query[..., 0], key[..., 0], queue, temperature).item() == pytest.approx(
        math.fsum(image_terms) / 3, rel=1e-6
    )


# --- two workers --------------------------------------------------------------------------------------------------


def share(batch: ViewPair) -> ViewPair:
    """This worker's part of a batch."""
    size = len(batch) // world_size()
    part = slice(rank() * size, (rank() + 1) * size)
    return ViewPair(batch.query[part], batch.key[part], batch.image_ids[part])


def train_with_ddp() -> dict[str, Tensor]:
    """Two steps with batch norm in evaluation mode: gradients of the first, everything after the second."""
    network = model().eval()
    wrapped = DistributedDataParallel(network, broadcast_buffers=False) if world_size() > 1 else network
    return two_steps(network, wrapped)


def train_moco_with_ddp() -> dict[str, Tensor]:
    """The same without the dense loss, whose head must not keep DDP waiting."""
    network = model(dense_loss_weight=0.0).eval()
    wrapped = DistributedDataParallel(network, broadcast_buffers=False) if world_size() > 1 else network
    return two_steps(network, wrapped)


def two_steps(network: DenseCL, wrapped: torch.nn.Module) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    results: dict[str, Tensor] = {}
    for step in range(2):
        losses = wrapped(share(views(4, seed=step)), step)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if step == 0:
            results |= {f"grad.{name}": p.grad.clone() for name, p in network.query.named_parameters()}
        optimizer.step()
        network.after_step(step)
        for name, loss in losses.items():
            results[f"loss.{step}.{name}"] = sum_over_workers(loss) / world_size()
    return results | {f"state.{name}": value for name, value in network.state_dict().items()}


def shuffle_batch_norm() -> dict[str, Tensor]:
    """The queues after a step in training mode, at a step whose permutation mixes the workers' images."""
    network = model().train()
    network(share(views(4)), 1)
    return {"global_queue": network.global_queue, "dense_queue": network.dense_queue}


def synchronised_batch_norm() -> dict[str, Tensor]:
    network = model(batch_norm="sync")
    assert isinstance(network.query.backbone.bn1, torch.nn.SyncBatchNorm)
    assert isinstance(network.key.backbone.bn1, torch.nn.SyncBatchNorm)
    with pytest.raises(UsageError, match=r"set model\.batch_norm=shuffle"):
        network.train()(share(views(4)), 0)
    return {}


def collectives() -> dict[str, Tensor]:
    mine = torch.tensor([[1.0, 2.0]]) * (rank() + 1)
    mine.requires_grad_()
    gathered, summed = gather_from_all_workers(mine), sum_over_workers(mine)
    assert not gathered.requires_grad
    assert not summed.requires_grad
    return {"gathered": gathered, "summed": summed, "own": mine.detach()}


SCENARIOS = (train_with_ddp, train_moco_with_ddp, shuffle_batch_norm, synchronised_batch_norm, collectives)


def run_scenarios(worker: int, folder: Path) -> None:
    torch.save({scenario.__name__: scenario() for scenario in SCENARIOS}, folder / f"{worker}.pt")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two workers returns from each scenario; all in one pair of processes, which are slow to start."""
    folder = tmp_path_factory.mktemp("workers")
    on_workers(2, run_scenarios, folder)
    return [torch.load(folder / f"{worker}.pt", weights_only=True) for worker in range(2)]


@pytest.mark.parametrize("scenario", [train_with_ddp, train_moco_with_ddp])
def test_two_workers_train_as_one(workers, scenario):
    one = scenario()
    first, second = (worker[scenario.__name__] for worker in workers)
    assert first.keys() == second.keys() == one.keys()
    for name, expected in one.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], expected, rtol=1e-4, atol=1e-6), name
    assert one["state.queue_pointer"].item() == 8 % 8
    moved = (one["state.key.backbone.conv1.weight"] - model().key.backbone.conv1.weight).abs().max()
    assert moved > 0


def test_shuffled_keys_come_back_in_their_places(workers):
    first, second = (worker["shuffle_batch_norm"] for worker in workers)
    permutation = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    parts = permutation.reshape(2, 2)
    assert {tuple(sorted(part)) for part in parts.tolist()} != {(0, 1), (2, 3)}  # else nothing is shown
    images = views(4).key
    expected = {"global_queue": model().global_queue, "dense_queue": model().dense_queue}
    for part in parts:
        encoding = model().train().key(images[part])  # batch norm over one worker's images of the shuffled batch
        expected["global_queue"][part] = encoding.image.detach()
        expected["dense_queue"][part] = encoding.pooled.detach()
    for name, queue in expected.items():
        assert torch.allclose(first[name], queue, atol=1e-5)
        assert torch.equal(first[name], second[name])
    # Without the shuffle the keys would be others: the test can tell.
    unshuffled = model().train().key(images[:2]).image
    assert not torch.allclose(unshuffled, expected["global_queue"][:2], atol=1e-3)


def test_synchronised_batch_norm_is_refused_on_a_cpu(workers):
    assert all("synchronised_batch_norm" in worker for worker in workers)  # each found it refused


def test_one_worker_needs_no_synchronisation():
    network = model(batch_norm="sync").train()
    assert type(network.query.backbone.bn1) is torch.nn.BatchNorm2d
    assert all(loss.isfinite() for loss in network(views(4), 0).values())


def test_collectives_of_two_workers(workers):
    for worker, result in enumerate(one["collectives"] for one in workers):
        assert result["gathered"].tolist() == [[1.0, 2.0], [2.0, 4.0]]
        assert result["summed"].tolist() == [[3.0, 6.0]]
        assert result["own"].tolist() == [[1.0 + worker, 2.0 + 2 * worker]]


def test_collectives_of_one_worker():
    assert (world_size(), rank()) == (1, 0)
    result = collectives()
    assert torch.equal(result["gathered"], result["own"])
    assert torch.equal(result["summed"], result["own"])
