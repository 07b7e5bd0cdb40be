"""What the card of a converted WFM says of its latents: which tokenizer made them, and their statistics."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per latent channel."""


def with_latents(
    card: CheckpointCard, *, tokenizer: str | Path | None, statistics: str | Path | None
) -> CheckpointCard:
    """Fills in what published weights do not tell, and what generation and post-training need.

    Args:
        card: Of a diffusion WFM.
        tokenizer: Anything `load_tokenizer` takes; its fingerprint goes into the card.
        statistics: JSON with `latent_mean` and `latent_std`, one number per channel each, such as a latent cache's
            `cache.json` or another card. Its `tokenizer_fingerprint` and `text_encoder`, where it has them, go into
            the card too.

    Raises:
        UserError: The statistics are not one number per channel, or belong to another tokenizer than the one given.
    """
    if tokenizer is not None:
        card = dataclasses.replace(card, tokenizer_fingerprint=load_tokenizer(tokenizer).model.fingerprint())
    if statistics is None:
        return card
    values = read_json(statistics)
    mean, std = _read_statistics(values, Path(statistics), card.config["in_channels"])
    fingerprint = values.get("tokenizer_fingerprint")
    if tokenizer is not None and fingerprint not in (None, card.tokenizer_fingerprint):
        raise UserError(
            f"{statistics}: these are statistics of latents of tokenizer {fingerprint}, but the tokenizer given is "
            f"{card.tokenizer_fingerprint}. Give the two that belong together."
        )
    return dataclasses.replace(
        card,
        latent_mean=mean,
        latent_std=std,
        tokenizer_fingerprint=fingerprint or card.tokenizer_fingerprint,
        text_encoder=values.get("text_encoder") or card.text_encoder,
    )


def _read_statistics(values: Any, path: Path, channels: int) -> Statistics:  # noqa: ANN401 - any JSON value
    found = (values.get("latent_mean"), values.get("latent_std")) if isinstance(values, dict) else (None, None)
    per_channel = all(isinstance(v, list) and len(v) == channels and all(map(_is_number, v)) for v in found)
    if not per_channel or min(found[1]) <= 0:
        got = [len(v) if isinstance(v, list) else v for v in found]
        raise user_error(
            str(path),
            f"latent_mean, latent_std of lengths {got}",
            f"{channels} numbers each, those of latent_std above 0",
            "Give one number per latent channel, or a cache.json that nemo-cosmos tokenize wrote.",
        )
    return tuple(map(float, found[0])), tuple(map(float, found[1]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
