"""What each positive's mask loses where labels say where an object is, and not its outline.

Source: BoxInst (arXiv:2012.02310) sec. 3 and FreeSOLO (arXiv:2202.12181) sec. 3.2, which take other means of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.ops.affinity import colour_similarity, pairwise_affinity_terms
from freesolo.solo.heads.base import MASK_STRIDE
from freesolo.solo.losses import SoftProjections, box_regions, max_projection_loss, mean_projection_loss
from freesolo.solo.supervisions.base import LossInputs
from freesolo.solo.supervisions.positives import Chunk, over_chunks
from freesolo.solo.targets import mask_targets

WeakTerm: TypeAlias = Literal["max_projection", "mean_projection", "pairwise"]
PAIR_COUNT = "pair_count"


def weak_terms(inputs: LossInputs, names: Sequence[WeakTerm]) -> dict[str, Float[Tensor, " P"]]:
    """The terms called `names`, of each positive, unweighted.

    Args:
        inputs: Its instances' masks say where objects are.
        names: What to compute.

    Returns:
        Each by name. `pairwise` is the sum over the pairs that a positive selects, and comes with their number,
        `pair_count`.
    """
    if not names:
        return {}
    masks = mask_targets(inputs.instances, MASK_STRIDE)
    regions, coarse = box_regions(masks), SoftProjections.of(masks.float())
    # Of a strong view as it is: its colours are jittered and it has erased patches, the same that the network sees.
    similarity = colour_similarity(inputs.images.pixels, inputs.images.valid_pixels(), stride=MASK_STRIDE)

    def terms_of(chunk: Chunk) -> Float[Tensor, "terms P"]:
        predicted, wanted = SoftProjections.of_logits(chunk.logits), coarse.take(chunk.instance)
        terms = []
        for name in names:
            if name == "max_projection":
                terms.append(max_projection_loss(predicted, wanted))
            elif name == "mean_projection":
                terms.append(mean_projection_loss(predicted, wanted))
            else:
                pairs = pairwise_affinity_terms(
                    chunk.logits,
                    similarity,
                    chunk.image,
                    regions[chunk.instance],
                    min_similarity=inputs.settings.pairwise_min_similarity,
                )
                terms += [pairs.loss_sum, pairs.pair_count]
        return torch.stack(terms)

    columns = [column for name in names for column in ([name, PAIR_COUNT] if name == "pairwise" else [name])]
    return dict(zip(columns, over_chunks(inputs, terms_of, terms=len(columns)), strict=True))


def pairwise_warmup(step: int, warmup_steps: int) -> float:
    """The pairwise term's share of its weight: from 0 at step 0, in a line, to 1 at `warmup_steps` and after."""
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
