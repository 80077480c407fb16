"""Free Mask against a slow numpy twin, written step by step from FreeSOLO (arXiv:2202.12181) sec. 3.1."""

import math

import numpy as np
import pytest
import torch

from freesolo.freemask.algorithm import free_masks
from freesolo.settings import FreeMaskSettings


def twin_resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, between pixel centres, of the last two axes."""

    def taps(old: int, new: int) -> list[tuple[int, int, float]]:
        result = []
        for i in range(new):
            position = max(0.0, (i + 0.5) * old / new - 0.5)
            low = min(math.floor(position), old - 1)
            result.append((low, min(low + 1, old - 1), position - low))
        return result

    rows = [values[..., a, :] * (1 - t) + values[..., b, :] * t for a, b, t in taps(values.shape[-2], height)]
    values = np.stack(rows, axis=-2)
    columns = [values[..., a] * (1 - t) + values[..., b] * t for a, b, t in taps(values.shape[-1], width)]
    return np.stack(columns, axis=-1)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.linalg.norm(vector), 1e-12)


def twin_maskness(features: np.ndarray, queries: list[np.ndarray], threshold: float) -> list[dict]:
    """Steps 2 to 4: one candidate for each query that is not flat and whose mask has two cells or more."""
    height, width = features.shape[1:]
    candidates = []
    for index, query in enumerate(queries):
        similarity = np.array([[unit(query) @ unit(features[:, r, c]) for c in range(width)] for r in range(height)])
        spread = similarity.max() - similarity.min()
        if spread < 1e-5:
            continue
        soft = (similarity - similarity.min()) / spread
        inside = soft > threshold
        if inside.sum() > 1:
            candidates.append({"query": index, "soft": soft, "inside": inside, "score": soft[inside].mean()})
    return candidates


def twin_nms(candidates: list[dict], sigma: float) -> None:
    """Step 5, Matrix NMS of candidates that are sorted by score; in place."""
    compensate: list[float] = []
    for j, this in enumerate(candidates):
        overlaps = []
        for other in candidates[:j]:
            union = (this["inside"] | other["inside"]).sum()
            overlaps.append((this["inside"] & other["inside"]).sum() / union)
        ratios = [
            math.exp(-sigma * overlap**2) / math.exp(-sigma * compensate[i] ** 2) for i, overlap in enumerate(overlaps)
        ]
        compensate.append(max(overlaps, default=0.0))
        this["decayed"] = this["score"] * min(ratios, default=1.0)


def twin_free_masks(features: np.ndarray, size: tuple[int, int], settings: FreeMaskSettings) -> list[dict]:
    height, width = features.shape[1:]
    queries = []
    for scale in settings.query_scales:
        level = twin_resize(features, max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
        queries += [level[:, r, c] for r in range(level.shape[1]) for c in range(level.shape[2])]

    candidates = twin_maskness(features, queries, settings.mask_threshold)
    candidates.sort(key=lambda candidate: -candidate["score"])
    twin_nms(candidates, settings.nms_sigma)
    candidates.sort(key=lambda candidate: -candidate["decayed"])

    kept = []
    for candidate in candidates[: settings.max_instances]:
        mask = twin_resize(candidate["soft"], *size) > settings.mask_threshold
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        if (
            candidate["decayed"] < settings.min_maskness
            or len(rows) == 0
            or (settings.top_border > 0 and rows.mean() <= settings.top_border * size[0])
            or (settings.max_width < 1 and len(columns) >= settings.max_width * size[1])
        ):
            continue
        query = queries[candidate["query"]]
        embedding = unit(twin_resize(query[None], 1, settings.embedding_channels)[0])
        kept.append({**candidate, "mask": mask, "embedding": embedding})
    return kept


def random_map(channels: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth random features, so that masks are patches; with a little noise, so that rounding decides no tie."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
    return smooth + 0.1 * torch.randn(channels, height, width, generator=generator)


def one_hot() -> torch.Tensor:
    features = torch.zeros(6, 5, 7)
    features[2, 1, 3] = 1.0
    return features


def two_blocks() -> torch.Tensor:
    """Many queries with equal masks and equal scores."""
    features = torch.zeros(6, 6, 7)
    features[0] = 1.0
    features[:, 2:5, 1:4] = torch.tensor([0.0, 1.0, 0, 0, 0, 0])[:, None, None]
    return features


def specks() -> torch.Tensor:
    """More queries with masks of one cell, each of maskness 1, than places; and a block among them."""
    features = torch.randn(96, 8, 8, generator=torch.Generator().manual_seed(6))
    features[:, 3:7, 2:6] = features[:, 3:4, 2:3] + 0.5 * features[:, 3:7, 2:6]
    return features


LOOSE = {"min_maskness": 0.1, "max_width": 1.0, "top_border": 0.35, "embedding_channels": 5}
MAPS = {
    "smooth": random_map(7, 9, 11, 0),
    "wide": random_map(5, 4, 13, 1),
    "noise": torch.randn(12, 6, 6, generator=torch.Generator().manual_seed(2)),
    "row": random_map(6, 1, 9, 3),
    "column": random_map(6, 8, 1, 4),
    "constant": torch.full((6, 5, 5), 2.0),
    "zeros": torch.zeros(6, 4, 4),
    "one-cell": torch.randn(6, 1, 1, generator=torch.Generator().manual_seed(5)),
    "one-hot": one_hot(),
    "two-blocks": two_blocks(),
    "specks": specks(),
}


@pytest.mark.parametrize("size", [(40, 55), (7, 5)], ids=["larger", "smaller"])
@pytest.mark.parametrize("options", [{}, LOOSE, {**LOOSE, "query_scales": (1.0, 0.3), "nms_sigma": 0.5}])
@pytest.mark.parametrize("name", MAPS)
def test_free_masks_equal_their_twin(name: str, options: dict, size: tuple[int, int]):
    settings = FreeMaskSettings(**({"embedding_channels": 4} | options))
    (found,) = free_masks(MAPS[name][None], [size], settings)
    expected = twin_free_masks(MAPS[name].double().numpy(), size, settings)
    assert found.query_index.tolist() == [candidate["query"] for candidate in expected]
    assert len(found) == 0 or name not in ("constant", "zeros", "one-cell")
    if not expected:
        return
    decayed = torch.tensor([candidate["decayed"] for candidate in expected]).float()
    torch.testing.assert_close(found.scores, decayed, atol=1e-5, rtol=1e-5)
    embeddings = torch.from_numpy(np.stack([candidate["embedding"] for candidate in expected])).float()
    torch.testing.assert_close(found.embeddings, embeddings, atol=1e-5, rtol=1e-5)
    masks = torch.from_numpy(np.stack([candidate["mask"] for candidate in expected]))
    # A soft value within rounding of the threshold may fall on either side of it.
    assert (found.masks.pixels() != masks).float().mean() < 1e-3


def test_the_twins_are_not_compared_on_nothing():
    settings = FreeMaskSettings(**LOOSE)
    for name in ("smooth", "wide", "noise", "row", "column", "two-blocks", "specks"):
        assert len(twin_free_masks(MAPS[name].double().numpy(), (40, 55), settings)) > 0
