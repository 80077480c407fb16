"""Pure tensor functions that the algorithms share: masks, non-maximum suppression, colour affinity, images."""
