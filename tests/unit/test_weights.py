"""Checkpoints of every wrapping load and are accounted for key by key; downloads survive what networks do."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from freesolo.errors import JobError, UsageError
from freesolo.models.download import RetryPolicy, download
from freesolo.models.resnet import ResNet
from freesolo.models.weights import (
    PUBLISHED,
    PublishedWeights,
    backbone_state_dict,
    digest,
    load_backbone,
    pull,
    read_state_dict,
    recorded_sha256,
)

IMPATIENT = RetryPolicy(attempts=3, first_delay=0.01, timeout=5.0)
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


# --- download -----------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path that ends in .pth; what it is asked is recorded in `requests`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = bytes(range(256)) * 20_000  # 5 MB
        self.etag: str | None = '"one"'
        self.drops: list[int] = []  # break off after so many bytes of the answer, one entry a request
        self.failures: list[int] = []  # statuses to answer first
        self.ranges = True
        self.requests: list[str | None] = []  # the Range header of each
        self.sent = Counter[str]()
        self.change_on_drop: tuple[bytes, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/models/w.pth"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.headers.get("Range"))
        if self.server.failures:
            self.send_error(self.server.failures.pop(0))
            return
        if not self.path.endswith(".pth"):
            self.send_error(404)
            return
        content, start = self.server.content, 0
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        unchanged = self.headers.get("If-Range") in (None, self.server.etag)
        if match and self.server.ranges and unchanged:
            start = int(match[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.drops.pop(0) if self.server.drops else len(content)
        self.wfile.write(content[start:end])
        self.server.sent["bytes"] += len(content[start:end])
        if end < len(content) and self.server.change_on_drop:
            self.server.content, self.server.etag = self.server.change_on_drop

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pull_fetches_once_and_reports_progress(server, tmp_path):
    seen: list[tuple[int, int | None]] = []
    path = pull(server.url, tmp_path / "new", progress=lambda done, total: seen.append((done, total)), retry=IMPATIENT)
    assert path == tmp_path / "new" / "w.pth"
    assert path.read_bytes() == server.content
    assert seen[-1] == (len(server.content), len(server.content))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert recorded_sha256(path) == server.sha256
    assert pull(server.url, tmp_path / "new", sha256=server.sha256.upper(), retry=IMPATIENT) == path
    assert len(server.requests) == 1
    assert names(tmp_path / "new") == {"w.pth", "w.pth.sha256"}


def test_published_names_are_resolved(server, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "mine", PublishedWeights(server.url, server.sha256, "resnet18", "a test"))
    assert pull("mine", tmp_path, retry=IMPATIENT).read_bytes() == server.content
    with pytest.raises(UsageError, match="its publisher states"):
        pull("mine", tmp_path, sha256="0" * 64)


def test_published_table_is_well_formed():
    for published in PUBLISHED.values():
        assert re.fullmatch(r"https://[\w./-]+\.(pth|pth\.tar)", published.url)
        assert published.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", published.sha256)
    assert len({published.url for published in PUBLISHED.values()}) == len(PUBLISHED)


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(JobError, match=f"has sha256 {server.sha256}, expected {'0' * 64}"):
        pull(server.url, tmp_path, sha256="0" * 64, retry=IMPATIENT)
    assert names(tmp_path) == set()


def test_first_use_is_remembered(server, tmp_path):
    path = pull(server.url, tmp_path, retry=IMPATIENT)
    path.unlink()
    server.content = b"something else" * 100_000
    with pytest.raises(JobError, match="has sha256"):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert not path.exists()


def test_a_file_that_was_changed_on_disk_is_refused(server, tmp_path):
    path = pull(server.url, tmp_path, retry=IMPATIENT)
    path.write_bytes(b"changed")
    with pytest.raises(JobError, match="delete it to fetch it again"):
        pull(server.url, tmp_path, retry=IMPATIENT)


def test_an_interrupted_transfer_goes_on(server, tmp_path):
    server.drops = [3_000_000, 1_000_000]
    path = pull(server.url, tmp_path, retry=IMPATIENT)
    assert path.read_bytes() == server.content
    assert server.requests == [None, "bytes=3000000-", "bytes=4000000-"]
    assert server.sent["bytes"] == len(server.content)


def test_a_second_run_goes_on_where_the_first_gave_up(server, tmp_path):
    server.drops = [2_000_000, 0, 0, 0]
    with pytest.raises(JobError, match=r"2000000 bytes are kept in .*run again"):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert names(tmp_path) == {"w.pth.part", "w.pth.part.etag"}
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content
    assert server.requests[-1] == "bytes=2000000-"
    assert names(tmp_path) == {"w.pth", "w.pth.sha256"}


def test_a_file_that_changes_between_attempts_is_fetched_anew(server, tmp_path):
    server.drops = [3_000_000]
    server.change_on_drop = (b"second" * 900_000, '"two"')
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == b"second" * 900_000


def test_without_version_or_checksum_it_starts_again(server, tmp_path):
    server.etag = None
    server.drops = [3_000_000]
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content
    assert server.requests == [None, None]


def test_with_a_checksum_no_version_is_needed(server, tmp_path):
    server.etag = None
    server.drops = [3_000_000]
    assert pull(server.url, tmp_path, sha256=server.sha256, retry=IMPATIENT).read_bytes() == server.content
    assert server.requests == [None, "bytes=3000000-"]


def test_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    server.drops = [3_000_000]
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content


@pytest.mark.parametrize("surplus", [0, 10])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, surplus):
    (tmp_path / "w.pth.part").write_bytes(server.content + b"x" * surplus)
    path = tmp_path / "w.pth"
    assert download(server.url, path, sha256=server.sha256, retry=IMPATIENT) == server.sha256
    assert path.read_bytes() == server.content
    assert names(tmp_path) == {"w.pth"}


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.failures = [503, 429]
    assert pull(server.url, tmp_path, retry=IMPATIENT).read_bytes() == server.content


def test_a_server_that_stays_busy(server, tmp_path):
    server.failures = [503] * 9
    with pytest.raises(JobError, match=r"answered 503 .* 3 times in a row"):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "words"), [(404, "check the address"), (403, "fetch it by hand")])
def test_a_definite_no_is_not_asked_again(server, tmp_path, status, words):
    server.failures = [status]
    with pytest.raises(UsageError, match=words):
        pull(server.url, tmp_path, retry=IMPATIENT)
    assert len(server.requests) == 1


def test_an_unreachable_server(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_address[1]
    with pytest.raises(JobError, match=r"refused.* 3 times in a row; 0 bytes are kept"):
        pull(f"http://127.0.0.1:{port}/w.pth", tmp_path, retry=IMPATIENT)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("densecl-r50-imagnet", "did you mean densecl-r50-imagenet"),
        ("s3://bucket/w.pth", "only http"),
        ("http://", "names no file"),
        ("http:///w.pth", "only http"),
        ("http://host/", "names no file"),
    ],
)
def test_what_cannot_be_pulled(tmp_path, name, words):
    with pytest.raises(UsageError, match=words):
        pull(name, tmp_path, retry=IMPATIENT)


def test_a_malformed_checksum(tmp_path):
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        pull("http://host/w.pth", tmp_path, sha256="abc")


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
