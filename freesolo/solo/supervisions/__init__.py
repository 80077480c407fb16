"""What SOLO learns from: one module a kind of supervision, all of them `base.Supervision`s."""
