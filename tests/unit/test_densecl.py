"""DenseCL: its losses by hand, where keys come from, the queues, warm-up, and what is in its state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from freesolo.config import PretrainJob
from freesolo.config_file import load_config
from freesolo.densecl.loss import dense_loss, info_nce, match_cells
from freesolo.densecl.model import DenseCL
from freesolo.errors import UsageError
from freesolo.models.weights import backbone_state_dict, load_backbone
from freesolo.settings import DenseCLModelSettings
from freesolo.types import ViewPair

QUEUES = ("global_queue", "dense_queue")
MOCO_V2 = Path(__file__).parents[2] / "configs" / "pretrain" / "moco_v2_r50.yaml"


def settings(**changes: object) -> DenseCLModelSettings:
    small = {"backbone": "resnet18", "hidden_channels": 16, "projection_channels": 8, "queue_length": 12}
    return DenseCLModelSettings(**{**small, **changes})


def model(seed: int = 0, **changes: object) -> DenseCL:
    return DenseCL(settings(**changes)).initialise(torch.Generator().manual_seed(seed))


def views(batch: int = 4, seed: int = 0, size: int = 64) -> ViewPair:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, 3, size, size, generator=generator)
    return ViewPair(query, key, tuple(range(batch)))


# --- losses by hand -----------------------------------------------------------------------------------------------


def test_info_nce_by_hand():
    query = torch.tensor([[1.0, 0.0]])
    positive = torch.tensor([[0.6, 0.8]])
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    # Similarities 0.6; 0 and -1; over a temperature of 0.5: 1.2; 0 and -2.
    expected = -math.log(math.exp(1.2) / (math.exp(1.2) + math.exp(0.0) + math.exp(-2.0)))
    assert info_nce(query, positive, queue, 0.5).item() == pytest.approx(expected, rel=1e-6)


def test_info_nce_is_a_mean_over_queries():
    query = torch.eye(2)
    queue = torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    one, other = (info_nce(query[i : i + 1], query[i : i + 1], queue, 0.2) for i in range(2))
    assert info_nce(query, query, queue, 0.2).item() == pytest.approx((one.item() + other.item()) / 2, rel=1e-6)


def test_match_is_the_row_maximum():
    # Rows are query cells. A column maximum, or a mutual one, would give other answers.
    query = torch.tensor([[[1.0, 0.9, 0.0], [0.0, 0.4, 1.0]]])  # cells (1, 0), (0.9, 0.4), (0, 1)
    key = torch.tensor([[[0.0, 1.0, 0.7], [-1.0, 0.0, 0.7]]])  # cells (0, -1), (1, 0), (0.7, 0.7)
    # Similarities: [0, 1, 0.7], [-0.4, 0.9, 0.91], [-1, 0, 0.7].
    assert match_cells(query, key).tolist() == [[1, 2, 2]]


def test_dense_loss_takes_the_matched_cells():
    key = torch.nn.functional.normalize(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    query = torch.nn.functional.normalize(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    queue = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    matches = torch.tensor([[2, 2, 0], [1, 0, 2]])
    losses = [
        info_nce(query[b, :, i][None], key[b, :, matches[b, i]][None], queue, 0.2).item()
        for b in range(2)
        for i in range(3)
    ]
    assert dense_loss(query, key, matches, queue, 0.2).item() == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_one_cell_is_the_smallest_map():
    vector = torch.ones(1, 1, 1)
    assert match_cells(vector, vector).tolist() == [[0]]
    loss = dense_loss(vector, vector, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), 1.0)
    assert loss.item() == pytest.approx(math.log(2))  # the negative is as near as the positive


# --- state --------------------------------------------------------------------------------------------------------


def test_initialise_sets_everything():
    network = DenseCL(settings())
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    network.queue_pointer.fill_(5)
    network.initialise(torch.Generator().manual_seed(0))
    for name, value in network.state_dict().items():
        assert value.isfinite().all(), name
    for name, value in network.query.state_dict().items():
        assert torch.equal(value, network.key.state_dict()[name])
    for name in QUEUES:
        assert torch.allclose(getattr(network, name).norm(dim=1), torch.ones(12))
    assert not torch.equal(network.global_queue, network.dense_queue)
    assert network.queue_pointer.item() == 0


def test_initialise_is_its_generators():
    first, second, other = model(), model(), model(seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.query.neck.dense_head[2].bias, other.query.neck.dense_head[2].bias)


def test_state_is_complete():
    first, second = model(), model(seed=1)
    first(views(), 0)
    second.load_state_dict(first.state_dict())
    for step in (1, 2):
        expected, found = first(views(seed=step), step), second(views(seed=step), step)
        for name, loss in expected.items():
            assert torch.equal(found[name], loss)
    assert torch.equal(first.dense_queue, second.dense_queue)
    assert second.queue_pointer.item() == 12 % 12


def test_pretrained_backbones_reach_both_encoders():
    network, pretrained = model(), model(seed=1).backbone
    load_backbone(network.backbone, backbone_state_dict(pretrained), source="test")
    network.copy_query_to_key()
    assert torch.equal(network.key.backbone.conv1.weight, pretrained.conv1.weight)
    assert not network.key.backbone.conv1.weight.requires_grad


def test_our_checkpoints_backbone_is_found_in_it():
    network = model()
    report = load_backbone(model(seed=1).backbone, network.state_dict(), source="test")
    assert report.prefix == "query.backbone."
    assert {name.partition(".")[0] for name in report.ignored} == {"query", "key", *QUEUES, "queue_pointer"}


# --- where keys come from, and where gradients go ------------------------------------------------------------------


def test_keys_come_from_the_momentum_encoder():
    def queues_after(change: str | None) -> torch.Tensor:
        network = model()
        if change is not None:
            for parameter in getattr(network, change).parameters():
                parameter.data.add_(0.05)
        network(views(), 0)
        return torch.cat([network.global_queue[:4], network.dense_queue[:4]])

    unchanged = queues_after(None)
    assert torch.equal(queues_after("query"), unchanged)
    assert (queues_after("key") - unchanged).abs().mean() > 0.01


def test_losses_depend_on_the_momentum_encoder():
    network = model()
    changed = model()
    for parameter in changed.key.parameters():
        parameter.data.add_(0.05)
    for name, loss in network(views(), 0).items():
        assert (loss - changed(views(), 0)[name]).abs() > 1e-4


def test_gradients_reach_all_of_the_query_encoder_and_none_of_the_key_encoder():
    network = model()
    sum(network(views(), 0).values()).backward()  # after the queues were written to
    for name, parameter in network.named_parameters():
        if name.startswith("query."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_momentum_has_its_closed_form():
    network = model(momentum=0.9)
    for parameter in network.query.parameters():
        parameter.data.add_(1.0)
    start = {name: value.clone() for name, value in network.key.named_parameters()}
    statistics = network.key.backbone.bn1.running_mean.clone()
    for step in range(3):
        network.after_step(step)
    for name, query in network.query.named_parameters():
        expected = 0.9**3 * start[name] + (1 - 0.9**3) * query
        assert torch.allclose(network.key.get_parameter(name), expected, atol=1e-6), name
    assert torch.equal(network.key.backbone.bn1.running_mean, statistics)


# --- lambda and its warm-up ----------------------------------------------------------------------------------------


def test_losses_are_weighted():
    even = model(dense_loss_weight=0.5)(views(), 0)
    skewed = model(dense_loss_weight=0.2)(views(), 0)
    assert skewed["global"].item() == pytest.approx(0.8 / 0.5 * even["global"].item(), rel=1e-5)
    assert skewed["dense"].item() == pytest.approx(0.2 / 0.5 * even["dense"].item(), rel=1e-5)


def test_the_dense_loss_begins_after_the_warmup():
    plain = model()(views(), 0)
    before, after = (model(dense_loss_warmup_steps=3)(views(), step) for step in (2, 3))
    assert before["dense"].item() == 0
    assert before["global"].item() == pytest.approx(2 * plain["global"].item(), rel=1e-5)
    assert after == plain


def test_without_the_dense_loss_it_is_moco():
    network = model(dense_loss_weight=0.0)
    losses = network(views(), 0)
    sum(losses.values()).backward()
    reference = model()
    query, key = reference.query(views().query), reference.key(views().key)
    expected = info_nce(query.image, key.image.detach(), model().global_queue, 0.2)
    expected.backward()
    assert losses["dense"].item() == 0
    assert losses["global"].item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in network.query.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for every parameter's
        if "dense_head" in name:
            assert parameter.grad.abs().sum() == 0
        else:
            assert torch.allclose(parameter.grad, reference.query.get_parameter(name).grad, atol=1e-7), name


def _must_not_run(*arguments: object) -> None:
    raise AssertionError("the dense loss is computed, and would be multiplied by zero")


def test_moco_v2_is_a_configuration_that_computes_no_dense_loss(monkeypatch: pytest.MonkeyPatch):
    small = [f"pretrain.model.{name}={value}" for name, value in settings().model_dump().items() if value is not None]
    small = [override for override in small if "dense_loss" not in override]  # as the configuration has it
    job = load_config(PretrainJob, MOCO_V2, [*small, "pretrain.loop.batch_size=4", "resources.workers=4"])
    network = DenseCL(job.pretrain.model).initialise(torch.Generator().manual_seed(0))
    before = network.query.neck.global_head[0].weight.clone()
    optimizer = torch.optim.SGD(network.query.parameters(), lr=0.03)
    monkeypatch.setattr("freesolo.densecl.model.match_cells", _must_not_run)
    monkeypatch.setattr("freesolo.densecl.model.dense_loss", _must_not_run)
    for step in range(2):
        sum(network(views(seed=step), step).values()).backward()
        optimizer.step()
    assert not torch.equal(network.query.neck.global_head[0].weight, before)
    monkeypatch.undo()
    monkeypatch.setattr("freesolo.densecl.model.dense_loss", _must_not_run)
    model(dense_loss_warmup_steps=3)(views(), 2)  # nor is it before it begins
    with pytest.raises(AssertionError, match="multiplied by zero"):
        model(dense_loss_warmup_steps=3)(views(), 3)


# --- queues -------------------------------------------------------------------------------------------------------


def test_queues_are_first_in_first_out():
    network = model(queue_length=8).eval()  # the keys of a batch do not depend on what else is in it
    before = network.global_queue.clone()
    batches = [views(seed=seed) for seed in range(3)]
    keys = [network.key(batch.key) for batch in batches]
    network(batches[0], 0)
    assert torch.equal(network.global_queue[4:], before[4:])
    network(batches[1], 1)
    assert torch.allclose(network.global_queue, torch.cat([keys[0].image, keys[1].image]), atol=1e-6)
    assert network.queue_pointer.item() == 0
    network(batches[2], 2)
    assert torch.allclose(network.global_queue, torch.cat([keys[2].image, keys[1].image]), atol=1e-6)
    assert torch.allclose(network.dense_queue, torch.cat([keys[2].pooled, keys[1].pooled]), atol=1e-6)
    assert network.queue_pointer.item() == 4


def test_the_losses_see_the_queues_before_the_batch_enters_them():
    network = model().eval()
    batch = views()
    query, key = network.query(batch.query), network.key(batch.key)
    expected = info_nce(query.image, key.image, network.global_queue.clone(), 0.2)
    assert network(batch, 0)["global"].item() == pytest.approx(0.5 * expected.item(), rel=1e-5)


def test_a_queue_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match=r"queue_length=12 is not divisible by loop.batch_size=5"):
        model()(views(batch=5), 0)
    with pytest.raises(UsageError, match="not divisible"):
        model()(views(batch=24, size=32), 0)


# --- shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid_size", "cells"), [(None, 9), (2, 4), (1, 1)])
def test_grid(grid_size, cells):
    network = model(grid_size=grid_size)
    encoding = network.query(views(size=96).query)
    assert encoding.features.shape == (4, 512, cells)
    assert encoding.dense.shape == (4, 8, cells)
    assert encoding.image.shape == encoding.pooled.shape == (4, 8)
    for vectors in encoding:
        norms = vectors.norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    losses = network(views(size=96), 0)
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())


def test_cells_are_matched_in_single_precision_under_autocast():
    # Cosines of 0.9990 and 0.9991 are one number in bfloat16; the second is the larger.
    angles = torch.tensor([[0.0447, 0.0424, 1.0]])
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([1.0, 0.0])[None, :, None].repeat(1, 1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second, _ = torch.bmm(query.mT, keys)[0, 0]
        assert first == second
        assert match_cells(query, keys).tolist() == [[1, 1, 1]]


def test_a_pooled_grid_is_the_mean_of_its_cells():
    pooled, whole = model(grid_size=1), model()
    pooled.load_state_dict(whole.state_dict())
    pooled.eval()
    whole.eval()
    images = views(size=96).query
    features = whole.query.backbone(images).c5
    expected = functional.normalize(features.mean(dim=(2, 3)), dim=1)
    torch.testing.assert_close(pooled.query(images).features[:, :, 0], expected)
    torch.testing.assert_close(pooled.query(images).image, whole.query(images).image)


def test_bfloat16_autocast_leaves_losses_and_queues_in_single_precision():
    network = model()
    expected = model()(views(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = network(views(), 0)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), abs=0.05)
    sum(losses.values()).backward()
    assert network.global_queue.dtype == torch.float32
    assert torch.allclose(network.global_queue.norm(dim=1), torch.ones(12), atol=1e-2)
