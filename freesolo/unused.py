"""Settings of the method on which nothing depends that it makes: what two runs differ in must be none of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from freesolo.settings import MASK_LOSSES, ColourSettings, TrainSettings

_CHANGES_NO_RESULT = {
    "what is forgiven changes no result": [
        f"{section}.max_bad_samples"
        for section in ("pretrain.stream", "extract", "train.stream", "predict", "held_out")
    ],
    "how a training is looked at and kept changes no result": [
        f"{loop}.{setting}"
        for loop in ("pretrain.loop", "train.loop")
        for setting in ("log_every", "checkpoint_every", "keep_checkpoints", "overlay_every", "record_samples")
    ],
    "what is made ready ahead changes no result": ["pretrain.stream.prefetch_batches", "train.stream.prefetch_batches"],
    "each training begins with the backbone": ["train.initial_weights"],
    "it is only looked at": ["pretrain.probe", "train.inference"],
}


def unused_settings(train: TrainSettings, *, pre_trains: bool, labels_anew: bool) -> dict[str, str]:
    """Settings without a part in the results, each with the reason; whole sections come last.

    Args:
        train: Of the method's trainings.
        pre_trains: Whether it begins with a pre-training.
        labels_anew: Whether there are rounds of self-training.
    """
    unused = {setting: reason for reason, settings in _CHANGES_NO_RESULT.items() for setting in settings}
    unused |= _unused_in_training(train)
    if not pre_trains:
        unused["pretrain"] = "with an initial_backbone nothing is pre-trained"
    if not labels_anew:
        unused["predict"] = "with rounds=0 nothing is labelled anew"
    return unused


def why_unused(settings: Iterable[str], unused: Mapping[str, str]) -> str:
    """Which of some settings are unused and why, in brackets for an error; empty where all are used."""
    reasons = [
        f"{setting}: {reason}"
        for setting in settings
        for other, reason in unused.items()
        if f"{setting}.".startswith(f"{other}.")
    ]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _unused_in_training(train: TrainSettings) -> dict[str, str]:
    """What of `train` depends on others of its settings, and is not used with these."""
    unused: dict[str, str] = {}
    if not train.views.strong:
        for setting in (*ColourSettings.model_fields, "erasing_probabilities", "copy_paste"):
            unused[f"train.views.{setting}"] = "with strong=false there is no view that it is of"
    losses = MASK_LOSSES[train.supervision]
    for loss in {loss for those in MASK_LOSSES.values() for loss in those}.difference(losses):
        unused[f"train.losses.{loss}"] = f"with supervision={train.supervision} there is no such loss"
    if "pairwise" not in losses or not train.losses.pairwise:
        for setting in ("pairwise_warmup_steps", "pairwise_min_similarity"):
            unused[f"train.losses.{setting}"] = "there is no pairwise loss"
    return unused
