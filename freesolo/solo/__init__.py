"""The SOLO family: heads, target assignment, losses, post-processing (arXiv:1912.04488, 2003.10152, 2202.12181)."""
