"""SOLO's supervision: masks that are right."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from freesolo.solo.heads.base import MASK_STRIDE
from freesolo.solo.losses import mask_dice_loss
from freesolo.solo.supervisions.base import LossInputs, Supervision
from freesolo.solo.supervisions.positives import Chunk, category_loss, level_counts, over_chunks
from freesolo.solo.targets import mask_targets


class Masks(Supervision):
    """Masks are right to the pixel, and a photo without any is background (SOLO, arXiv:1912.04488)."""

    def losses(self, inputs: LossInputs) -> dict[str, Float[Tensor, ""]]:
        """SOLOv2's losses on masks that are right: focal on every cell, Dice on the positives' masks.

        Source: SOLO (arXiv:1912.04488) sec. 3.3.2, eq. 2 and 3: Dice is averaged over all positives alike.

        Returns:
            `category`, `dice`.
        """
        with torch.autocast(inputs.predictions.category_logits.device.type, enabled=False):
            counts = level_counts(inputs)
            masks = mask_targets(inputs.instances, MASK_STRIDE)

            def terms_of(chunk: Chunk) -> Float[Tensor, "1 P"]:
                return mask_dice_loss(chunk.logits, masks[chunk.instance])[None]

            dice = over_chunks(inputs, terms_of, terms=1)[0]
            return {
                "category": category_loss(inputs, counts, empty_images="background"),
                "dice": inputs.settings.dice * dice.sum() / counts.sum().clamp(min=1.0),
            }
