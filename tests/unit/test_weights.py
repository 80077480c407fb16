"""Checkpoints of every wrapping load and are accounted for key by key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from freesolo.errors import UsageError
from freesolo.models.resnet import ResNet
from freesolo.models.weights import backbone_state_dict, digest, load_backbone, read_state_dict

SSCD = Path(
    os.environ.get("FREESOLO_TEST_WEIGHTS")
    or Path(__file__).parents[3] / "shared" / "weights" / "resnet50_sscd_fp16.pth"
)


def network(depth: int = 18, seed: int = 0) -> ResNet:
    return ResNet(depth).initialise(torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """A ResNet-18's state, with a counter of batches that is not the initial one."""
    state = backbone_state_dict(network(seed=1))
    state["bn1.num_batches_tracked"] = torch.tensor(7)
    return state


def head(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2) for name in names}


# --- wrappers and prefixes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("", head("fc.weight", "fc.bias")),  # torchvision
        ("module.", head("module.fc.weight")),  # its DataParallel
        ("backbone.", head("neck.mlp.0.weight", "head.criterion.w", "queue", "queue2_ptr")),  # mmselfsup
        (  # OpenSelfSup: the query encoder twice, under two names
            "backbone.",
            head(
                "encoder_q.0.conv1.weight", "encoder_q.1.mlp.0.bias", "encoder_k.0.conv1.weight", "queue", "queue_ptr"
            ),
        ),
        ("encoder_q.0.", head("encoder_q.1.mlp.0.weight", "encoder_k.0.conv1.weight", "queue2")),
        ("module.encoder_q.0.", head("module.encoder_q.1.mlp2.0.weight", "module.queue_ptr")),
        ("module.encoder_q.", head("module.encoder_q.fc.0.weight", "module.encoder_k.conv1.weight", "module.queue")),
        ("module.backbone.", head("module.neck.fc.weight")),
        ("query.backbone.", head("query.neck.hidden.weight", "key.backbone.conv1.weight", "global_queue")),  # ours
    ],
)
def test_every_prefix_loads(trained, prefix, beside):
    target = network()
    state = {prefix + name: value for name, value in trained.items()} | beside
    report = load_backbone(target, state, source="w")
    assert report.prefix == prefix
    assert report.loaded == len(trained)
    assert sorted(report.ignored) == sorted(beside)
    assert digest(backbone_state_dict(target)) == digest(trained)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_every_wrapper_is_opened(tmp_path, wrapper):
    state = {"conv1.weight": torch.arange(3.0), "bn1.num_batches_tracked": torch.tensor(7)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    assert digest(read_state_dict(tmp_path / "w.pth")) == digest(state)


def test_half_precision_becomes_single(trained):
    halves = {name: value.half() if value.is_floating_point() else value for name, value in trained.items()}
    target = network()
    report = load_backbone(target, halves, source="w")
    assert len(report.cast) == 100  # 20 convolutions, 20 norms of 4 floating tensors
    assert target.conv1.weight.dtype == torch.float32
    assert torch.equal(target.conv1.weight, halves["conv1.weight"].float())


def test_counters_of_old_checkpoints_may_be_missing(trained):
    old = {name: value for name, value in trained.items() if "num_batches_tracked" not in name}
    target = network()
    target.bn1.num_batches_tracked.fill_(5)
    assert load_backbone(target, old, source="w").loaded == 100
    assert target.bn1.num_batches_tracked.item() == 0


# --- refusals -----------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_keys_are_named(trained):
    broken = dict(trained)
    del broken["layer3.1.conv2.weight"]
    broken["layer1.0.attention.weight"] = torch.zeros(1)
    broken["bn1.weight"] = torch.zeros(3)
    target = network()
    before = digest(target.state_dict())
    with pytest.raises(UsageError) as error:
        load_backbone(target, broken, source="broken.pth")
    message = str(error.value)
    assert message.startswith("broken.pth: does not fit a resnet18: ")
    assert "1 missing (layer3.1.conv2.weight)" in message
    assert "1 unexpected (layer1.0.attention.weight)" in message
    assert "1 of another shape (bn1.weight (3,), not (64,))" in message
    assert "right depth" in message
    assert digest(target.state_dict()) == before


@pytest.mark.parametrize(("depth", "name"), [(34, "resnet34"), (50, "resnet50"), (101, "resnet101")])
def test_another_depth_is_recognised(depth, name):
    with torch.device("meta"):
        other = {f"backbone.{key}": value for key, value in ResNet(depth).state_dict().items()}
    with pytest.raises(UsageError, match=f"is a ResNet-{depth} checkpoint, .* says resnet18: set backbone to {name}"):
        load_backbone(network(), other, source="w")


def test_a_detector_is_refused_for_its_unknown_keys(trained):
    detector = {f"backbone.{name}": value for name, value in trained.items()} | head("bbox_branch.weight")
    with pytest.raises(UsageError, match=r"1 unexpected \(bbox_branch.weight\)"):
        load_backbone(network(), detector, source="w")


def test_no_resnet_in_it():
    with pytest.raises(UsageError, match=r"no ResNet found .* its keys begin patch_embed.weight"):
        load_backbone(network(), head("patch_embed.weight"), source="vit.pth")


class Intruder:
    """What would run on unpickling, were pickles trusted."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Intruder(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w\.pth: cannot be read"):
        read_state_dict(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", {"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}, {"state_dict": {}}]
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UsageError, match=r"w\.pth"):
        read_state_dict(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(UsageError, match="no such weights file"):
        read_state_dict(tmp_path / "w.pth")


# --- out ----------------------------------------------------------------------------------------------------------


def test_backbone_state_is_a_copy():
    target = network()
    state = backbone_state_dict(target)
    state["conv1.weight"].zero_()
    assert target.conv1.weight.abs().sum() > 0
    assert all(value.is_contiguous() and not value.requires_grad for value in state.values())


def test_digest_sees_content_and_not_order_or_layout():
    state = {"a": torch.arange(24.0).reshape(1, 2, 3, 4), "b": torch.tensor(3), "c": torch.zeros(0)}
    expected = digest(state)
    assert digest(dict(reversed(state.items()))) == expected
    assert digest({**state, "a": state["a"].contiguous(memory_format=torch.channels_last)}) == expected
    for other in (
        {**state, "b": torch.tensor(4)},
        {**state, "b": torch.tensor(3, dtype=torch.int32)},
        {**state, "a": state["a"].reshape(1, 2, 4, 3)},
        {**state, "c": torch.zeros(0, 1)},
        {"a": state["a"], "b": state["b"], "d": state["c"]},
        {"a": state["a"], "b": state["b"]},
    ):
        assert digest(other) != expected
    assert digest({"x": torch.ones(2, dtype=torch.bfloat16)}) != digest({"x": torch.zeros(2, dtype=torch.bfloat16)})


# --- real weights -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SSCD.is_file(), reason="no real weights here; set FREESOLO_TEST_WEIGHTS")
def test_real_self_supervised_weights_load_and_see():
    target = network(50)
    report = load_backbone(target, read_state_dict(SSCD), source=str(SSCD))
    assert (report.prefix, report.loaded, report.ignored) == ("", 318, ())
    assert len(report.cast) == 53  # its convolutions are in half precision
    target.eval()
    generator = torch.Generator().manual_seed(0)
    flat, noise = torch.zeros(1, 3, 64, 64), torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        maps = target(torch.cat([flat, noise, noise.flip(3)])).c5.mean(dim=(2, 3))
    similar = torch.nn.functional.cosine_similarity
    assert maps.isfinite().all()
    assert 0.01 < maps.mean().item() < 10
    # A mirrored image is nearer to the image than to a blank one.
    assert similar(maps[1], maps[2], dim=0) > similar(maps[1], maps[0], dim=0) + 0.1
