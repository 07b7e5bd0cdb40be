"""Curated clips in, latent cache out."""

from __future__ import annotations

from pathlib import Path

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.latent_cache import LatentCacheConfig, write_latent_cache
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.text import load_text_encoder
from nemo_cosmos.tokenizer.streaming import StreamingEncoder


def tokenize(
    curated: str | Path,
    output: str | Path,
    *,
    tokenizer: str = "tokenizer_tiny",
    text_encoder: str = "minilm-l6",
    config: LatentCacheConfig | None = None,
    worker: int = 0,
    num_workers: int = 1,
) -> LatentCacheCard | None:
    """Writes the latent cache of a curated folder; goes on where an earlier run stopped.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache.
        tokenizer: A tokenizer folder or NeMo checkpoint, or the name of embedded weights.
        text_encoder: A name of `nemo_cosmos.text.TEXT_ENCODERS`.
        config: What to cut from each clip.
        worker: This process's number, in an array job.
        num_workers: Size of the array.

    Returns:
        The cache's card, or None when other workers are not done.

    Raises:
        UserError: See `write_latent_cache`.
    """
    loaded, device = load_tokenizer(tokenizer), current_device()
    return write_latent_cache(
        curated,
        output,
        tokenizer=StreamingEncoder(loaded.model.to(device)),
        tokenizer_name=loaded.name,
        text_encoder=load_text_encoder(text_encoder).to(device),
        config=config or LatentCacheConfig(),
        worker=worker,
        num_workers=num_workers,
    )
