"""DenseCL pre-training (arXiv:2011.09157): contrast images, and the cells of their feature maps."""
