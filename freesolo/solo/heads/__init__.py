"""SOLO's heads: one module a kind, all of them `base.Head`s."""
