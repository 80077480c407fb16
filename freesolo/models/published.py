"""Backbones that their authors publish, fetched by name or by URL, with the checksum that each must have."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from freesolo.errors import JobError, UsageError
from freesolo.models.download import Progress, RetryPolicy, download, sha256_of_file
from freesolo.settings import Backbone


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A checkpoint that its authors publish.

    Attributes:
        url: Where it is.
        sha256: Checksum its publisher states; None where none is stated: trusted on first use.
        backbone: The network that it is of.
        source: Who trained it, on what.
    """

    url: str
    sha256: str | None
    backbone: Backbone
    source: str


_ADELAIDET = "https://huggingface.co/ZjuCv/AdelaiDet/resolve"
_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"

# The DenseCL authors' files as AdelaiDet's maintainers host them since the original host closed, each at the revision
# that added it; the checksums are those of the hub's own records of these revisions.
PUBLISHED: dict[str, PublishedWeights] = {
    "densecl-r50-imagenet": PublishedWeights(
        url=f"{_ADELAIDET}/811602d39d516ef6181be837024ad936916a08f9/densecl_r50_imagenet_200ep.pth",
        sha256="08286baa2701cdca040e31589f4ca9875cbbe86aa00cf6896aa7a2c8994fee6f",
        backbone="resnet50",
        source="DenseCL (arXiv:2011.09157), ImageNet, 200 epochs",
    ),
    "densecl-r101-imagenet": PublishedWeights(
        url=f"{_ADELAIDET}/c4c43866d4ccc81bb522ab3cbd0389ab4b5d4ec3/densecl_r101_imagenet_200ep.pth",
        sha256="f13e5bedebaad08dc5d6d378ff968dfed86c52ffe79089aa9d68d7d93a581fe4",
        backbone="resnet101",
        source="DenseCL (arXiv:2011.09157), ImageNet, 200 epochs",
    ),
    "densecl-r50-coco": PublishedWeights(
        url=f"{_ADELAIDET}/67f258deeefdb82395162745e7763e61e08a7023/densecl_r50_coco_800ep.pth",
        sha256="3302edfbcbc0c708629a5207bb34e9d6758aa186830b5dd32d824ba9b024be5e",
        backbone="resnet50",
        source="DenseCL (arXiv:2011.09157), COCO train2017, 800 epochs",
    ),
    "densecl-r50-coco-1600": PublishedWeights(
        url=f"{_ADELAIDET}/d7f81ea2ba7b1b9c32e8176660782ba1e2e981e4/densecl_r50_coco_1600ep.pth",
        sha256="d6bb653821f70ed15cb05ff91e39ef67c183187620bfa352c4698123220fb141",
        backbone="resnet50",
        source="DenseCL (arXiv:2011.09157), COCO train2017, 1600 epochs",
    ),
    "moco-v2-r50-imagenet": PublishedWeights(
        url=f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
        sha256=None,
        backbone="resnet50",
        source="MoCo v2 (arXiv:2003.04297), ImageNet, 200 epochs",
    ),
    "moco-v2-r50-imagenet-800": PublishedWeights(
        url=f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        sha256=None,
        backbone="resnet50",
        source="MoCo v2 (arXiv:2003.04297), ImageNet, 800 epochs",
    ),
}


def pull(
    name_or_url: str,
    folder: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    retry: RetryPolicy | None = None,
) -> Path:
    """Fetch a published checkpoint, or one at a URL, into `folder`; nothing is fetched that is there already.

    The checksum that the file must have is `sha256`, or the publisher's, or, where neither is known, the one that was
    written beside it (`<file>.sha256`) when it first came: trust on first use. `recorded_sha256` reads it.

    Args:
        name_or_url: A key of `PUBLISHED`, or an `http(s)://` address.
        folder: Made if it is not there.
        sha256: In hexadecimal.
        progress: Called with bytes so far, and in all where known.
        retry: How long to keep trying.

    Returns:
        The file.

    Raises:
        UsageError: No such name or file, or the checksums asked for contradict each other.
        JobError: The server cannot be reached, or the file is not the expected one.
    """
    url, stated = _resolve(name_or_url)
    demanded = _agreed_checksum(name_or_url, sha256, stated)
    target = folder / _file_name(url)
    expected = demanded or recorded_sha256(target)
    if target.exists():
        found = sha256_of_file(target)
        if expected is not None and found != expected:
            raise JobError(f"{target}: has sha256 {found}, expected {expected}; delete it to fetch it again")
    else:
        found = download(url, target, sha256=expected, progress=progress, retry=retry)
    _record_file(target).write_text(f"{found}  {target.name}\n", encoding="utf-8")
    return target


def recorded_sha256(path: Path) -> str | None:
    """The checksum that `pull` wrote beside a file; None if it never did.

    Raises:
        JobError: What is there is no checksum.
    """
    record = _record_file(path)
    if not record.exists():
        return None
    words = record.read_text(encoding="utf-8", errors="replace").split()
    if not words or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise JobError(f"{record}: holds no sha256; delete it, and {path.name}, to fetch that again")
    return words[0]


def _record_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _resolve(name_or_url: str) -> tuple[str, str | None]:
    if "://" in name_or_url:
        return name_or_url, None
    if name_or_url not in PUBLISHED:
        near = difflib.get_close_matches(name_or_url, PUBLISHED, n=1)
        raise UsageError(
            f"{name_or_url}: no such published weights"
            + (f"; did you mean {near[0]}?" if near else "")
            + f" Give an http(s):// address or one of {', '.join(PUBLISHED)}"
        )
    published = PUBLISHED[name_or_url]
    return published.url, published.sha256


def _agreed_checksum(name: str, asked: str | None, stated: str | None) -> str | None:
    if asked is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", asked):
        raise UsageError(f"sha256 {asked!r}: must be 64 hexadecimal digits")
    asked = asked.lower() if asked is not None else None
    if asked is not None and stated is not None and asked != stated:
        raise UsageError(f"{name}: sha256 {asked} was asked for, but its publisher states {stated}")
    return asked or stated


def _file_name(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if name in ("", ".."):
        raise UsageError(f"{url}: names no file")
    return name
