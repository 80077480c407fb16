"""Unsupervised instance segmentation: DenseCL, Free Mask, SOLO and self-training on Ray."""

__version__ = "0.1.0"
