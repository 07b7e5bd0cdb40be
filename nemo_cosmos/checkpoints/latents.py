"""What the card of a converted WFM says of its latents: which tokenizer made them, and their statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.tokenizer.statistics import check_statistics

_OF_LATENTS = (
    *("tokenizer_fingerprint", "latent_mean", "latent_std", "image_latent_mean", "image_latent_std"),
    "text_encoder",
)
"""Fields of a card that files of weights alone have no place for."""


def told(card: CheckpointCard, names: Sequence[str] = _OF_LATENTS) -> list[str]:
    """Those of some fields of a card that it has; by default those of its latents."""
    return [name for name in names if getattr(card, name) is not None]


def with_latents(
    card: CheckpointCard, *, tokenizer: str | Path | None, statistics: str | Path | None
) -> CheckpointCard:
    """Fills in what published weights do not tell, and what generation and post-training need.

    Args:
        card: Of a diffusion WFM.
        tokenizer: Anything `load_tokenizer` takes; its fingerprint goes into the card, and so do the statistics that it
            comes with, as published ones do.
        statistics: JSON with `latent_mean` and `latent_std`, one number per channel, or per channel and latent frame,
            such as a latent cache's `cache.json` or another card; they go before the tokenizer's own. Its
            `tokenizer_fingerprint` and `text_encoder`, where it has them, go into the card too.

    Raises:
        UserError: The statistics are not those of so many channels, or belong to another tokenizer than the one given.
    """
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        told = {name: value for name, value in loaded.statistics.card_fields().items() if value is not None}
        card = dataclasses.replace(card, tokenizer_fingerprint=loaded.model.fingerprint(), **told)
    if statistics is None:
        return card
    values = read_json(statistics)
    values = values if isinstance(values, dict) else {}
    mean, std = values.get("latent_mean"), values.get("latent_std")
    check_statistics(str(statistics), mean, std, num_channels=card.config["in_channels"])
    fingerprint = values.get("tokenizer_fingerprint")
    if tokenizer is not None and fingerprint not in (None, card.tokenizer_fingerprint):
        raise UserError(
            f"{statistics}: these are statistics of latents of tokenizer {fingerprint}, but the tokenizer given is "
            f"{card.tokenizer_fingerprint}. Give the two that belong together."
        )
    return dataclasses.replace(
        card,
        latent_mean=tuple(map(float, mean)),
        latent_std=tuple(map(float, std)),
        tokenizer_fingerprint=fingerprint or card.tokenizer_fingerprint,
        text_encoder=values.get("text_encoder") or card.text_encoder,
    )
