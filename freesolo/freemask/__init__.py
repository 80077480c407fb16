"""Free Mask: coarse object masks from a frozen self-supervised backbone (FreeSOLO, arXiv:2202.12181, sec. 3.1)."""
