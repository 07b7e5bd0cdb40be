"""By what latents are normalised: videos by the statistics of videos, pictures by those of pictures.

Source: Cosmos report (arXiv 2501.03575), section 5.1 (domain-specific normalisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_cosmos.contracts import CheckpointCard, LatentCacheCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Of each domain; a domain without caches has none."""

    video: Moments | None
    image: Moments | None

    def of_frames(self, num_latent_frames: int) -> Moments:
        """Statistics of samples of that many latent frames: of pictures, where it is one."""
        moments = self.image if num_latent_frames == 1 else self.video
        assert moments is not None, num_latent_frames
        return moments

    def card_fields(self) -> dict[str, Any]:
        """For the checkpoint's card; a model of pictures alone has theirs in the place of videos'."""
        main = self.video or self.image
        assert main is not None
        fields: dict[str, Any] = {"latent_mean": main[0], "latent_std": main[1]}
        if self.video and self.image:
            fields |= {"image_latent_mean": self.image[0], "image_latent_std": self.image[1]}
        return fields


def statistics_for(caches: Sequence[LatentCacheCard], base_card: str | None = None) -> LatentStatistics:
    """Finds the statistics of each domain: those of its first cache, or those of the model that is trained on.

    Args:
        caches: All that are trained on together.
        base_card: Card of the checkpoint that is post-trained; its statistics come first.

    Raises:
        UserError: Tokenizer or text encoder differ between the caches, or from the base's tokenizer; or the card is not
            that of a diffusion WFM.
    """
    for name in ("tokenizer_fingerprint", "text_encoder"):
        values = sorted({getattr(cache, name) for cache in caches})
        if len(values) > 1:
            raise user_error(f"{name} of the caches", values, "one for all", "Write the caches with the same.")
    first: dict[bool, Moments] = {}
    for cache in caches:
        first.setdefault(_is_of_pictures(cache), (cache.latent_mean, cache.latent_std))
    video, image = first.get(False), first.get(True)
    if base_card is not None:
        base = _base(base_card, caches[0])
        if video is not None:
            video = base.latent_statistics(num_latent_frames=2)
        if image is not None and base.image_latent_mean is not None or video is None:
            image = base.latent_statistics(num_latent_frames=1)
    return LatentStatistics(video=video, image=image)


def _is_of_pictures(cache: LatentCacheCard) -> bool:
    return cache.latent_shape[1] == 1


def _base(path: str, cache: LatentCacheCard) -> CheckpointCard:
    base = CheckpointCard.from_dict(read_json(path))
    if base.latent_mean is None or base.latent_std is None:
        raise user_error("statistics_of", path, "the card of a diffusion WFM", "Give its card.json.")
    if base.tokenizer_fingerprint != cache.tokenizer_fingerprint:
        raise UserError(
            f"{path}: this model was trained on latents of tokenizer {base.tokenizer_fingerprint}, but the cache "
            f"was written by {cache.tokenizer_fingerprint}. Tokenize again with the model's tokenizer."
        )
    return base
