"""Continuous latents and discrete tokens of the same windows, for the diffusion decoder."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.latent_cache import LatentDataset, require_continuous
from nemo_cosmos.errors import UserError, user_error

_SAME_WINDOWS = "Write both caches from the same curated folder, with the same windows and views."


class PairedLatents(Dataset):
    """Samples of a cache of latents, each with the tokens of the same window.

    Args:
        latents: What is sampled, in its order.
        tokens: The same windows by a discrete tokenizer, in any order.

    Raises:
        UserError: One of them has windows that the other lacks.
    """

    def __init__(self, latents: LatentDataset, tokens: LatentDataset) -> None:
        self._latents, self._tokens = latents, tokens
        self._keys = latents.keys
        self._place_of = {key: place for place, key in enumerate(tokens.keys)}
        of_latents, of_tokens = {*self._keys}, {*self._place_of}
        if of_latents != of_tokens:
            raise UserError(
                f"{latents.root}, {tokens.root}: {len(of_latents - of_tokens)} windows of the latents have no tokens, "
                f"{len(of_tokens - of_latents)} of the tokens no latents. {_SAME_WINDOWS}"
            )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample: what `LatentDecoder.decode` gives of the latents, and `tokens` int32 [T, H, W]."""
        tokens = self._tokens[self._place_of[self._keys[index]]]["tokens"]
        return {**self._latents[index], "tokens": tokens}


def check_windows(path: str, latents: LatentCacheCard, tokens_path: str, tokens: LatentCacheCard) -> None:
    """Refuses two caches that cannot be of the same windows, by their cards.

    Args:
        path: Of the continuous latents.
        latents: Their card.
        tokens_path: Of the tokens.
        tokens: Their card.

    Raises:
        UserError: One is of the other kind, or they differ in size or number.
    """
    require_continuous(latents)
    if tokens.continuous:
        raise user_error(
            "tokens", f"{tokens_path}: latents of {tokens.tokenizer}", "indices", "Tokenize with a DV tokenizer."
        )
    of_latents, of_tokens = (
        {name: getattr(card, name) for name in ("num_frames", "height", "width", "num_latent_frames", "num_samples")}
        for card in (latents, tokens)
    )
    if of_latents != of_tokens:
        raise user_error(
            f"windows of {tokens_path}",
            of_tokens,
            f"{of_latents}, as {path}",
            _SAME_WINDOWS,
        )
