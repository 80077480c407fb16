"""Networks as small as the code allows; each test says what matters to it."""

from __future__ import annotations

from typing import Any

from freesolo.settings import SoloModelSettings


def small_solo(**changes: Any) -> SoloModelSettings:
    """A SOLO with one convolution a tower, for images of about 64 pixels."""
    settings: dict[str, Any] = {
        "backbone": "resnet18",
        "fpn_channels": 8,
        "head": {"tower_channels": 32, "tower_convs": 1, "mask_tower_channels": 32, "kernel_channels": 32},
        "embedding_channels": 4,
        "grid_sizes": (6, 5, 4, 3, 2),
        "scale_ranges": ((1, 12), (6, 24), (12, 48), (24, 96), (48, 256)),
    }
    return SoloModelSettings(**settings | changes)
