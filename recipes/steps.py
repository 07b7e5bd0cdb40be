"""Recipes of the steps around training: collecting, curating, tokenizing, generating, evaluating.

Each returns the whole configuration of one step; values not given here are the step's own defaults.
"""

from __future__ import annotations

import nemo_run as run

from recipes.annotations import with_types
from recipes.settings import conf_file, read_yaml


@with_types
def collect(output_dir: str = "runs/raw", videos: str | None = None) -> run.Partial:
    """Raw video: the packaged clips, or the folder `videos` of your own, and simulator rollouts."""
    from nemo_cosmos.simulation.collect import CollectConfig
    from nemo_cosmos.simulation.collect import collect as step

    return run.Partial(step, output_dir=output_dir, config=run.Config(CollectConfig), videos=videos)


@with_types
def curate(input_dir: str = "runs/raw", output_dir: str = "runs/curated") -> run.Partial:
    """Curated clips: shots, transcoding, filters, captions, embeddings, deduplication, shards and a report."""
    from curator_stages.pipeline import curate as step

    return run.Partial(
        step, input_dir=input_dir, output_dir=output_dir, config=_curation_config(), executor="in_process"
    )


@with_types
def curate_part(input_dir: str = "runs/raw", output_dir: str = "runs/curated") -> run.Partial:
    """One task's share of the per-video work, in a Slurm array job; `curate` afterwards joins the shares."""
    from recipes.array_jobs import curate_part as step

    return run.Partial(step, input_dir=input_dir, output_dir=output_dir, config=_curation_config())


@with_types
def dedup(embeddings: str = "runs/embeddings", output_dir: str = "runs/dedup") -> run.Partial:
    """Near-duplicates among embeddings in parquet files, of any number, and a summary by distance."""
    from curator_stages.dedup.config import SemanticDedupConfig
    from curator_stages.dedup.semantic import semantic_dedup as step

    return run.Partial(step, embeddings=embeddings, output_dir=output_dir, config=run.Config(SemanticDedupConfig))


def _curation_config() -> run.Config:
    from curator_stages.config import CurationConfig

    return run.Config(CurationConfig, **read_yaml(conf_file("curation.yaml")))


@with_types
def tokenize(
    curated: str = "runs/curated", output: str = "runs/latents", tokenizer: str = "tokenizer_tiny"
) -> run.Partial:
    """The latent cache: tokenizer output, text states and conditions of every curated clip."""
    from nemo_cosmos.data.latent_cache import LatentCacheConfig
    from nemo_cosmos.steps.tokenize import tokenize as step

    return run.Partial(step, curated=curated, output=output, tokenizer=tokenizer, config=run.Config(LatentCacheConfig))


@with_types
def tokenize_part(
    curated: str = "runs/curated",
    output: str = "runs/latents",
    tokenizer: str = "tokenizer_tiny",
    text_encoder: str = "minilm-l6",
) -> run.Partial:
    """One task's share of a latent cache, in a Slurm array job."""
    from nemo_cosmos.data.latent_cache import LatentCacheConfig
    from recipes.array_jobs import tokenize_part as step

    return run.Partial(
        step,
        curated=curated,
        output=output,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        config=run.Config(LatentCacheConfig),
    )


@with_types
def generate(output: str = "runs/generated.mp4", prompt: str = "A car drives along a street.") -> run.Partial:
    """One video from a prompt, a first frame and actions, guarded before and after."""
    from nemo_cosmos.generation.layout import GenerationLayout
    from nemo_cosmos.generation.sampling import SamplingConfig
    from nemo_cosmos.steps.generate import GuardConfig
    from nemo_cosmos.steps.generate import generate as step

    return run.Partial(
        step,
        output=output,
        prompt=prompt,
        sampling=run.Config(SamplingConfig),
        guards=run.Config(GuardConfig),
        layout=run.Config(GenerationLayout),
    )


@with_types
def evaluate(curated: str = "runs/curated", output: str = "runs/evaluation") -> run.Partial:
    """Video prediction on held-out rollouts, beside repeating the last frame and an unconditional WFM."""
    from nemo_cosmos.generation.sampling import SamplingConfig
    from nemo_cosmos.steps.evaluate_wfm import evaluate_wfm as step

    return run.Partial(step, curated=curated, output=output, sampling=run.Config(SamplingConfig))


@with_types
def evaluate_tokenizer(
    data: str = "runs/curated", output: str = "runs/tokenizer_evaluation", tokenizer: str = "tokenizer_tiny"
) -> run.Partial:
    """Reconstruction of held-out clips, or of a folder of videos and pictures, beside other coding at the same rate."""
    from nemo_cosmos.steps.evaluate_tokenizer import evaluate_tokenizer as step
    from nemo_cosmos.tokenizer.reconstruction import CodingConfig

    return run.Partial(step, data=data, output=output, tokenizer=tokenizer, coding=run.Config(CodingConfig))
