"""Backbones, the feature pyramid, and the exchange of weights with the rest of the field."""
