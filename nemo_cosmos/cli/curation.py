"""collect, curate, dedup, tokenize: from raw video to latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from nemo_cosmos.cli.output import Json, show


def add_to(app: typer.Typer) -> None:
    """Adds this file's commands."""
    app.command()(collect)
    app.command()(curate)
    app.command()(dedup)
    app.command()(tokenize)


def collect(
    output: Annotated[Path, typer.Argument(help="Folder to write the raw videos to.")],
    videos: Annotated[
        Path | None, typer.Option(help="Folder of your own videos, instead of the packaged clips.")
    ] = None,
    num_street: Annotated[int, typer.Option(min=0, help="Rollouts of the driven car, for training.")] = 40,
    num_arm: Annotated[int, typer.Option(min=0, help="Rollouts of the robot arm, for training.")] = 40,
    num_heldout: Annotated[int, typer.Option(min=0, help="Rollouts of each simulator kept for evaluation.")] = 8,
    num_multiview: Annotated[int, typer.Option(min=0, help="Street rollouts seen by all six cameras.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the training rollouts; held-out ones do not depend on it.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Simulator processes.")] = 2,
    as_json: Json = False,
) -> None:
    """Collect raw video: packaged clips or your own, and simulator rollouts with actions, cameras and captions."""
    from nemo_cosmos.simulation.collect import CollectConfig
    from nemo_cosmos.simulation.collect import collect as run

    config = CollectConfig(
        num_street=num_street,
        num_arm=num_arm,
        num_heldout_street=num_heldout,
        num_heldout_arm=num_heldout,
        num_multiview=num_multiview,
        seed=seed,
        workers=workers,
    )
    show(dataclasses.asdict(run(output, config, videos)), as_json=as_json)


def curate(
    videos: Annotated[
        str, typer.Argument(help="Folder, glob, manifest (.parquet, .csv, .jsonl) or tars of raw videos; s3://... too.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write shards, manifest and report to.")],
    config: Annotated[Path | None, typer.Option(help="YAML like conf/curation.yaml, which is the default.")] = None,
    executor: Annotated[str, typer.Option(help="in_process, ray_data or xenna.")] = "in_process",
    as_json: Json = False,
) -> None:
    """Curate: split into shots, transcode, filter, caption, embed, deduplicate, shard; with an HTML report."""
    from curator_stages.config import load_config
    from curator_stages.pipeline import curate as run
    from recipes.settings import conf_file

    settings = load_config(config or conf_file("curation.yaml"))
    show(run(videos, output, settings, executor=executor).to_dict(), as_json=as_json)


def dedup(
    embeddings: Annotated[
        Path, typer.Argument(help="Folder of parquet files with columns id, embedding, pixels, duration_s.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write the duplicates and the summary to.")],
    eps_to_extract: Annotated[float, typer.Option(help="Distance up to which two are duplicates.")] = 0.01,
    sim_metric: Annotated[str, typer.Option(help="cosine or l2.")] = "cosine",
    max_iter: Annotated[int, typer.Option(help="Most k-means iterations.")] = 100,
    n_clusters: Annotated[
        int | None, typer.Option(help="k-means clusters; by default the number's square root.")
    ] = None,
    memory_gb: Annotated[float, typer.Option(help="Most memory for embeddings on a CPU.")] = 1.5,
    backend: Annotated[str, typer.Option(help="cpu, or gpu for NeMo-Curator's workflow on cuML.")] = "cpu",
    dataframes: Annotated[str, typer.Option(help="Library of the tables of results: pandas or cudf.")] = "pandas",
    as_json: Json = False,
) -> None:
    """Deduplicate embeddings of any number: near-duplicates and a summary by distance; the best resolution stays."""
    from curator_stages.dedup.config import SemanticDedupConfig
    from curator_stages.dedup.semantic import semantic_dedup

    config = SemanticDedupConfig(
        eps_to_extract=eps_to_extract,
        sim_metric=sim_metric,
        max_iter=max_iter,
        n_clusters=n_clusters,
        memory_gb=memory_gb,
        backend=backend,
        dataframes=dataframes,
    )
    show(dataclasses.asdict(semantic_dedup(embeddings, output, config)), as_json=as_json)


def tokenize(
    curated: Annotated[Path, typer.Argument(help="Folder that `curate` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder of the latent cache.")],
    tokenizer: Annotated[
        str, typer.Option(help="Published, diffusers or NeMo folder, hf:// address, or an embedded name.")
    ] = "tokenizer_tiny",
    text_encoder: Annotated[
        str, typer.Option(help="minilm-l6, t5-11b, or a diffusers pipeline's folder.")
    ] = "minilm-l6",
    num_frames: Annotated[int, typer.Option(help="Frames per sample, 1 + k times the tokenizer's compression.")] = 17,
    height: Annotated[int, typer.Option(help="Pixels.")] = 128,
    width: Annotated[int, typer.Option(help="Pixels.")] = 128,
    window_stride: Annotated[int, typer.Option(help="Frames between two samples of a clip.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Samples encoded at once.")] = 8,
    views: Annotated[
        str,
        typer.Option(help="Only these cameras, as front,side; `all` for every one. Clips of one camera always pass."),
    ] = "front,side",
    executor: Annotated[str, typer.Option(help="in_process, ray_data or xenna.")] = "in_process",
    token_files: Annotated[
        Path | None,
        typer.Option(help="Folder for the tokens as Megatron's .bin and .idx too; with a discrete tokenizer."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the latent cache: tokenizer output, text states and conditions of every curated clip.

    Goes on where it stopped; in a Slurm array job, every task writes its share of the shards.
    """
    from nemo_cosmos.data.latent_cache import LatentCacheConfig
    from nemo_cosmos.steps.tokenize import tokenize as run

    config = LatentCacheConfig(
        num_frames=num_frames,
        height=height,
        width=width,
        window_stride=window_stride,
        batch_size=batch_size,
        views=None if views == "all" else tuple(name.strip() for name in views.split(",")),
    )
    card = run(
        curated,
        output,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        config=config,
        executor=executor,
        token_files=token_files,
    )
    result = {"finished": False} if card is None else {"finished": True, **card.to_dict()}
    show(result, as_json=as_json)
