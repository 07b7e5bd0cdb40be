"""By what latents are normalised: videos by the statistics of videos, pictures by those of pictures.

Source: Cosmos report (arXiv 2501.03575), section 5.1 (domain-specific normalisation).
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_cosmos.contracts import CheckpointCard, LatentCacheCard
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.tokenizer.statistics import LatentStatistics, Numbers


def statistics_for(caches: Sequence[LatentCacheCard], base_card: str | None = None) -> LatentStatistics:
    """Finds the statistics of each kind: those of its first cache, or those of the model that is trained on.

    Indices of a discrete tokenizer have none; of them the tokenizer alone is compared.

    Args:
        caches: All that are trained on together.
        base_card: Card of the checkpoint that is post-trained; what it knows is kept.

    Raises:
        UserError: Tokenizer or text encoder differ between the caches, or from the base's tokenizer; or the card is not
            that of a WFM of such latents.
    """
    for name in ("tokenizer_fingerprint", "text_encoder"):
        values = sorted({getattr(cache, name) for cache in caches})
        if len(values) > 1:
            raise user_error(f"{name} of the caches", values, "one for all", "Write the caches with the same.")
    if not caches[0].continuous:
        if base_card is not None:
            _check_tokenizer(base_card, CheckpointCard.from_dict(read_json(base_card)), caches[0])
        return LatentStatistics()
    videos = [cache for cache in caches if cache.num_latent_frames > 1]
    pictures = [cache for cache in caches if cache.num_latent_frames == 1]
    main = (videos or pictures)[0]
    mean, std = main.latent_mean, main.latent_std
    image_mean: Numbers | None = None
    image_std: Numbers | None = None
    if videos and pictures:
        image_mean, image_std = pictures[0].latent_mean, pictures[0].latent_std
    if base_card is not None:
        base = _base(base_card, main)
        mean, std = base.mean, base.std
        if base.image_mean is not None:
            image_mean, image_std = base.image_mean, base.image_std
    return LatentStatistics(mean=mean, std=std, image_mean=image_mean, image_std=image_std)


def _base(path: str, cache: LatentCacheCard) -> LatentStatistics:
    card = CheckpointCard.from_dict(read_json(path))
    found = LatentStatistics.of_card(card)
    if found.of(2) is None:
        raise user_error("statistics_of", path, "the card of a diffusion WFM", "Give its card.json.")
    _check_tokenizer(path, card, cache)
    return found


def _check_tokenizer(path: str, card: CheckpointCard, cache: LatentCacheCard) -> None:
    if card.tokenizer_fingerprint != cache.tokenizer_fingerprint:
        raise UserError(
            f"{path}: this model was trained on latents of tokenizer {card.tokenizer_fingerprint}, but the cache "
            f"was written by {cache.tokenizer_fingerprint}. Tokenize again with the model's tokenizer."
        )
