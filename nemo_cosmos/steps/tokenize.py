"""Curated clips in, latent cache out."""

from __future__ import annotations

from pathlib import Path

import torch
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.resources import Resources

from curator_stages.executor import make_executor
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.data.latent_writer import begin_latent_cache, finish_latent_cache
from nemo_cosmos.data.token_files import write_token_files
from nemo_cosmos.errors import user_error
from nemo_cosmos.steps.tokenize_stages import EncodeCaptionsStage, ShardReaderStage, TokenizeStage
from nemo_cosmos.text import text_encoder_config
from nemo_cosmos.tokenizer.load import LoadedTokenizer
from nemo_cosmos.tokenizer.statistics import Numbers, check_statistics
from nemo_cosmos.tokenizer.streaming import StreamingEncoder

_TEXT_SHARE_OF_GPU = 0.25
"""T5-11B's encoder takes 10 GB in bf16; the tokenizer beside it has the rest of that GPU."""


def tokenize(
    curated: str | Path,
    output: str | Path,
    *,
    tokenizer: str = "tokenizer_tiny",
    text_encoder: str = "minilm-l6",
    config: LatentCacheConfig | None = None,
    executor: str = "in_process",
    token_files: str | Path | None = None,
) -> LatentCacheCard | None:
    """Writes the latent cache of a curated folder; goes on where an earlier run stopped.

    In a Slurm array job every task writes its share of the shards. The card says by what to normalise the latents:
    statistics that the tokenizer comes with, as published ones do, else those of the training split.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder of the cache.
        tokenizer: Anything `load_tokenizer` takes, of videos.
        text_encoder: A name of `nemo_cosmos.text.TEXT_ENCODERS`, or a folder as `text_encoder_config` takes it.
        config: What to cut from each clip.
        executor: A name of `curator_stages.executor.EXECUTORS`; the Ray ones need folders that all workers see.
        token_files: Folder for the tokens of the finished cache as Megatron's `.bin` and `.idx` too, see
            `nemo_cosmos.data.token_files`; needs a discrete tokenizer.

    Returns:
        The cache's card, or None when other tasks of the array are not done.

    Raises:
        UserError: There is no curated shard or no long enough clip, the models cannot be had, the sizes do not fit the
            tokenizer, or `output` belongs to another tokenizer or configuration; or token files are asked for of
            continuous latents.
    """
    # Workers of another machine start in another folder.
    curated, output = str(Path(curated).resolve()), str(Path(output).resolve())
    tokenizer = str(Path(tokenizer).resolve()) if Path(tokenizer).exists() else tokenizer
    text_encoder = str(Path(text_encoder).resolve()) if Path(text_encoder).is_dir() else text_encoder
    config, encoder, runner = config or LatentCacheConfig(), text_encoder_config(text_encoder), make_executor(executor)
    loaded = load_tokenizer(tokenizer)
    vocab_size = loaded.model.tokenizer_config.vocab_size
    if token_files is not None and vocab_size is None:
        raise user_error("token_files", token_files, "None with a continuous tokenizer", "Give a discrete one (DV).")
    StreamingEncoder(loaded.model).check(config.num_frames, config.height, config.width)
    statistics = _statistics_of(loaded, config)
    fingerprint = loaded.model.fingerprint()
    begin_latent_cache(curated, output, fingerprint, config, encoder.name)
    stages = [
        ShardReaderStage(curated=curated, output=output),
        EncodeCaptionsStage(
            curated=curated,
            text_encoder=text_encoder,
            config=config,
            resources=Resources(cpus=1.0, gpus=_TEXT_SHARE_OF_GPU if torch.cuda.is_available() else 0.0),
        ),
        TokenizeStage(
            curated=curated,
            output=output,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            config=config,
            progress=executor == "in_process",
            resources=Resources(cpus=1.0, gpus=1.0 - _TEXT_SHARE_OF_GPU if torch.cuda.is_available() else 0.0),
        ),
    ]
    Pipeline(name="tokenize", stages=stages).run(runner)
    card = finish_latent_cache(
        curated,
        output,
        fingerprint=fingerprint,
        tokenizer_name=loaded.name,
        text_encoder=encoder,
        config=config,
        statistics=statistics,
        vocab_size=vocab_size,
    )
    if card is not None and token_files is not None:
        write_token_files(output, token_files)
    return card


def _statistics_of(loaded: LoadedTokenizer, config: LatentCacheConfig) -> tuple[Numbers, Numbers] | None:
    """What the tokenizer's latents of this length are normalised by, where it tells that.

    Raises:
        UserError: It tells it of fewer frames.
    """
    architecture = loaded.model.tokenizer_config
    if architecture.levels is not None:
        return None
    num_channels, num_frames, *_ = architecture.latent_shape(config.num_frames, config.height, config.width)
    found = loaded.statistics.of(num_frames)
    if found is not None:
        name = f"latent statistics of {loaded.name}"
        check_statistics(name, *found, num_channels=num_channels, num_latent_frames=num_frames)
    return found
