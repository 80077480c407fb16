"""Models applied to data sets: the pool of actors that Free Mask extraction and batch prediction share."""
