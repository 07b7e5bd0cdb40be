"""How many bits an autoregressive WFM needs for the tokens of held-out windows, beside counted token models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nemo_cosmos.data.latent_cache import LatentDataset
from nemo_cosmos.data.token_files import TokenFiles, are_token_files
from nemo_cosmos.errors import user_error
from nemo_cosmos.evaluation.token_models import count_token_models
from nemo_cosmos.evaluation.video_prediction import MethodResult, PredictionEvaluation, measure_over_videos
from nemo_cosmos.generation.autoregressive_world_model import AutoregressiveWorldModel
from nemo_cosmos.steps.heldout import HeldOutWindow

BITS = "bits per token"
"""Name of the measure; the fewer the better."""


def evaluate_token_bits(
    model: AutoregressiveWorldModel,
    windows: list[HeldOutWindow],
    actions: Mapping[str, list[np.ndarray]],
    *,
    latents: str | Path | None = None,
    num_frames: int,
    batch_size: int = 8,
) -> PredictionEvaluation:
    """Measures bits per token of what follows the first latent frame, which is given.

    Args:
        model: The WFM, with actions.
        windows: At least one.
        actions: By name of a method each window's actions, [T - 1, ACTION_DIM].
        latents: Latent cache or token files that the WFM was trained on, to count token models on; None for none. Of a
            cache the samples with actions are counted.
        num_frames: Frames of each window that are measured, from its start: no more than the WFM was trained on.
        batch_size: Windows at once.

    Returns:
        A method for each name of `actions`, then the token models; frames are latent ones.

    Raises:
        UserError: The cache is missing, or another tokenizer's.
    """
    models = {} if latents is None else _token_models(model, latents)
    bits: dict[str, list[np.ndarray]] = {name: [] for name in (*actions, *models)}
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        tokens = model.tokenize([window.frames[:num_frames] for window in batch])
        prompts = [window.caption for window in batch]
        for name, rows in actions.items():
            moves = np.stack([of_one[: num_frames - 1] for of_one in rows[start : start + batch_size]])
            bits[name].extend(model.token_bits(tokens, prompts, moves))
        for name, of_tokens in models.items():
            bits[name].extend(of_tokens(video) for video in tokens.cpu().numpy())
    num_latent_frames = 1 + len(next(iter(bits.values()))[0])
    frames = np.arange(1, num_latent_frames)
    return PredictionEvaluation(
        num_videos=len(windows),
        num_frames=num_latent_frames,
        skip_frames=1,
        methods=tuple(
            MethodResult(method=name, measures=(measure_over_videos(BITS, frames, np.mean(values, axis=(2, 3))),))
            for name, values in bits.items()
        ),
    )


def _token_models(model: AutoregressiveWorldModel, latents: str | Path) -> Mapping:
    samples = (
        TokenFiles(latents, split="train")
        if are_token_files(latents)
        else LatentDataset(latents, split="train", with_actions=True)
    )
    ours, theirs = model.card.tokenizer_fingerprint, samples.card.tokenizer_fingerprint
    if samples.card.continuous or ours != theirs:
        raise user_error(
            f"tokenizer of {latents}", theirs, f"{ours}, with which {model.card.model} was trained", "Give its cache."
        )

    def videos() -> Iterator[np.ndarray]:
        for number in range(len(samples)):
            yield samples[number]["tokens"].numpy()

    return count_token_models(videos, vocab_size=model.config.vocab_size)
