"""train, generate, convert, evaluate, guard: work with models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_cosmos.cli.output import Json, show

_evaluate = typer.Typer(name="evaluate", help="Measure a tokenizer or a WFM.", no_args_is_help=True)
_guard = typer.Typer(name="guard", help="Run the guardrail alone on a prompt or a video.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Adds this file's commands."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
    app.command()(train_stages)
    app.command()(generate)
    app.command()(convert)
    app.add_typer(_evaluate)
    app.add_typer(_guard)


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A training recipe; see `nemo-cosmos recipes list`.")],
) -> None:
    """Run a training recipe here, with overrides such as `trainer.max_steps=100 data.path=latents`.

    For containers and clusters use nemo-run: `nemo cosmos pretrain --factory RECIPE run.executor=slurm ...`.
    """
    from recipes.launch import run_here

    run_here(recipe, context.args)


def train_stages(
    size: Annotated[
        str, typer.Argument(help="Diffusion: tiny, 7b or 14b. Autoregressive: autoregressive_tiny, 4b or 12b.")
    ],
    latents: Annotated[str, typer.Option(help="Latent cache of the first stage.")] = "runs/latents",
    latents_highres: Annotated[
        str,
        typer.Option(help="Latent cache of larger or longer videos, for all stages but the first and the cool-down."),
    ] = "runs/latents_highres",
    latents_quality: Annotated[
        str, typer.Option(help="Latent cache of the best of these, for the cool-down.")
    ] = "runs/latents_quality",
    pictures: Annotated[
        str | None,
        typer.Option(help="Latent cache of single frames, for every other batch of a diffusion WFM's first stage."),
    ] = None,
    pictures_highres: Annotated[
        str | None, typer.Option(help="Latent cache of larger ones, for the later stages that take pictures.")
    ] = None,
    directory: Annotated[str, typer.Option(help="Folder for all stages; the same one again goes on.")] = "runs/stages",
    max_steps: Annotated[
        tuple[int, int, int, int] | None, typer.Option(help="Steps of each stage, instead of the recipes' own.")
    ] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Of 8 GPUs; for the published sizes.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the stages as jobs that wait for each other.")] = False,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="With --slurm: print the scripts instead.")] = False,
) -> None:
    """Pretrain a WFM in four stages.

    Diffusion: low resolution, high resolution, cool-down, Video2World. Autoregressive: 17 frames, 33 frames, text,
    cool-down.

    Each stage starts from the weights of the one before. A stage that was interrupted goes on, a finished one is passed
    over.
    """
    from nemo_cosmos.errors import user_error
    from recipes.stages import stages_of, submit_stages

    if dryrun and not slurm:
        raise user_error("--dryrun", True, "to stand with --slurm", "Give both, or see `nemo-cosmos recipes show`.")
    stages = stages_of(
        size,
        latents=latents,
        latents_highres=latents_highres,
        latents_quality=latents_quality,
        pictures=pictures,
        pictures_highres=pictures_highres,
        directory=directory,
        max_steps=max_steps,
        **({} if num_nodes is None else {"num_nodes": num_nodes}),
    )
    if slurm:
        submit_stages(stages, dryrun=dryrun)
        return
    from nemo_cosmos.quickstart.process import run_recipe

    for number, stage in enumerate(stages, start=1):
        typer.echo(f"[{number}/{len(stages)}] {stage.name}", err=True)
        run_recipe(stage.recipe)


def generate(
    output: Annotated[Path, typer.Argument(help="The mp4 to write.")],
    prompt: Annotated[str, typer.Option(help="What the video shows; not for a WFM without text.")] = "",
    checkpoint: Annotated[
        str,
        typer.Option(
            help="WFM, diffusion or autoregressive: NeMo folder, safetensors file with its card, diffusers pipeline "
            "folder, hf:// address, or embedded name."
        ),
    ] = "diffusion_tiny_action",
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, hf:// address, or embedded name; a pipeline has its own.")
    ] = None,
    diffusion_decoder: Annotated[
        str | None,
        typer.Option(
            help="Autoregressive: makes frames of tokens in place of the tokenizer; NeMo folder, safetensors file with "
            "its card, or embedded name."
        ),
    ] = None,
    continuous_tokenizer: Annotated[
        str | None, typer.Option(help="Whose latents the diffusion decoder draws; tokenizer_tiny.")
    ] = None,
    first_frame: Annotated[Path | None, typer.Option(help="Picture or video to go on from.")] = None,
    num_first_frames: Annotated[int, typer.Option(help="Frames taken from a video: 1 or 9.")] = 1,
    actions: Annotated[Path | None, typer.Option(help="JSON or npy with one row of 7 per generated frame.")] = None,
    num_frames: Annotated[
        int | None, typer.Option(help="1 + 8k; 17 for the tiny models, 121 for the others, 33 autoregressive.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; 128 or 704, 640 autoregressive.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; 128 or 1280, 1024 autoregressive.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second; 10 or 24, 25 autoregressive.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Diffusion: denoising steps; 4 or 36.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Diffusion: euler, heun, res_2ab or dpmpp_2m; euler or res_2ab.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Diffusion: g in cond + g (cond - uncond); 0 or 7.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="Diffusion: what guidance moves away from.")] = "",
    input_frames_guidance: Annotated[
        bool, typer.Option(help="Diffusion: guidance moves away from a video without the first frame too.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Autoregressive: divides the logits; 1, and 0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Autoregressive: probability that admitted tokens hold; 0.8, and 1 admits all.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Autoregressive: admit so many of the likeliest tokens.")] = None,
    speculation: Annotated[
        str | None,
        typer.Option(
            help="Autoregressive: how tokens are guessed ahead, which changes none: previous_frame, medusa, "
            "where there are heads, or none; previous_frame."
        ),
    ] = None,
    compile: Annotated[  # noqa: A002 - the flag's name
        bool,
        typer.Option(help="Autoregressive: run steps through torch.compile, on GPUs in CUDA graphs."),
    ] = False,
    chunk_frames: Annotated[
        int | None,
        typer.Option(
            help="Generate a long video in chunks of so many frames, 1 + 8k; 17 or 33 autoregressive, else the whole."
        ),
    ] = None,
    overlap_frames: Annotated[int, typer.Option(help="Last frames of a chunk that the next one is given: 1 or 9.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    guard: Annotated[bool, typer.Option(help="Run the guardrail.")] = True,
    offload: Annotated[bool, typer.Option(help="Have each model in memory only while it works.")] = False,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks among which weights are cut; start it by torchrun.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Ranks among which blocks are dealt out.")] = 1,
    context_parallel: Annotated[int, typer.Option(help="Ranks among which tokens are cut.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option(help="Cut tokens over the tensor-parallel ranks too.")] = False,
    shard_weights: Annotated[bool, typer.Option(help="Share out whole weights block by block (FSDP).")] = False,
    split_guidance: Annotated[bool, typer.Option(help="A rank of its own for each branch of guidance.")] = False,
    as_json: Json = False,
) -> None:
    """Generate a video from a prompt, a first frame and actions; guarded before and after."""
    from nemo_cosmos.generation.layout import GenerationLayout
    from nemo_cosmos.generation.sampling import SamplingConfig
    from nemo_cosmos.parallel.first_rank import is_first_rank
    from nemo_cosmos.steps.generate import GuardConfig
    from nemo_cosmos.steps.generate import generate as run

    sampling = SamplingConfig(
        num_frames=num_frames,
        height=height,
        width=width,
        fps=fps,
        num_steps=num_steps,
        sampler=sampler,
        guidance=guidance,
        input_frames_guidance=input_frames_guidance,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        speculation=speculation,
        compile=compile,
        chunk_frames=chunk_frames,
        overlap_frames=overlap_frames,
        seed=seed,
    )
    layout = GenerationLayout(
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        context=context_parallel,
        sequence_parallel=sequence_parallel,
        shard_weights=shard_weights,
        split_guidance=split_guidance,
    )
    record = run(
        output,
        prompt=prompt,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        diffusion_decoder=diffusion_decoder,
        continuous_tokenizer=continuous_tokenizer,
        first_frame=first_frame,
        num_first_frames=num_first_frames,
        actions=actions,
        sampling=sampling,
        negative_prompt=negative_prompt,
        guards=GuardConfig() if guard else GuardConfig(prompt=(), video=()),
        layout=layout,
        offload=offload,
    )
    if is_first_rank():
        show(record.to_dict(), as_json=as_json)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="NeMo checkpoint, diffusers or published folder, reference .jit, .pt or .safetensors, or "
            "hf://OWNER/NAME, hf://OWNER/NAME@REVISION or with /PATH behind."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Folder or file to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="nemo, diffusers, reference, or safetensors (with a card, as embedded); "
            "of a tokenizer also folder, torchscript (published layout), torch_export, or onnx."
        ),
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Architecture of reference weights: diffusion_7b, autoregressive_4b, CV8x8x8-720p, "
            "Cosmos-Tokenize1-CV8x8x8-720p."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as the source when absent.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or embedded name that a WFM was trained with, for its card."),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="JSON with latent_mean and latent_std (cache.json, or a card) for a diffusion WFM's card; else the "
            "tokenizer's own."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of a tokenizer or a WFM, diffusion or autoregressive, between formats, bit for bit.

    Published tokenizers tell their preset by their folder's name or config.json, published WFMs by their shapes.
    Pickled code is never run. WFMs of any size are converted weight by weight. Of autoregressive WFMs that are cut over
    tensor-parallel ranks (model_mp_0.pt, model_mp_1.pt, ...) name any file.

    Published weights of a diffusion WFM tell neither their tokenizer nor their latents' statistics, except in a
    diffusers pipeline. Generation and post-training need both: give them here as --tokenizer, whose folder may hold the
    statistics, and --statistics.

    Downloads go on where they stopped; HF_HUB_OFFLINE, HF_TOKEN and HF_HOME are respected.
    """
    from nemo_cosmos.checkpoints.convert import convert as run

    result = run(source, target, to=to, preset=preset, dtype=dtype, tokenizer=tokenizer, statistics=statistics)
    show(result, as_json=as_json)


@_evaluate.command("tokenizer")
def evaluate_tokenizer(
    data: Annotated[Path, typer.Argument(help="Folder of videos and pictures, or one that `curate` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for measures.json, report.html, the sheet and the plot.")],
    tokenizer: Annotated[
        str, typer.Option(help="Tokenizer folder, hf:// address, or embedded name.")
    ] = "tokenizer_tiny",
    max_frames: Annotated[int | None, typer.Option(help="At most so many frames of each file.")] = None,
    temporal_window: Annotated[
        int | None,
        typer.Option(help="Code windows of so many frames alone; the published code takes 17. Without: one stream."),
    ] = None,
    tile: Annotated[int | None, typer.Option(help="Code larger pictures in tiles of so many pixels.")] = None,
    max_attended_frames: Annotated[
        int | None, typer.Option(help="Latent frames that temporal attention sees at most, to bound memory.")
    ] = None,
    num_clips: Annotated[int, typer.Option(help="Held-out windows to measure, of a folder that `curate` wrote.")] = 32,
    fast: Annotated[bool, typer.Option(help="Leave out the Fréchet distance and the video codecs.")] = False,
    as_json: Json = False,
) -> None:
    """PSNR, SSIM, LPIPS-like, Fréchet distance, codebook use and bits of a tokenizer, beside H.264 and H.265.

    Videos and pictures may have any size and length: they are coded as a stream, in flat memory. Of a folder that
    `curate` wrote, held-out windows are taken, and bicubic and DCT coding at the same rate are compared as well.
    """
    from nemo_cosmos.steps.evaluate_tokenizer import evaluate_tokenizer as run
    from nemo_cosmos.tokenizer.reconstruction import CodingConfig

    result = run(
        data,
        output,
        tokenizer=tokenizer,
        coding=CodingConfig(temporal_window=temporal_window, tile=tile, max_attended_frames=max_attended_frames),
        max_frames=max_frames,
        fast=fast,
        num_clips=num_clips,
    )
    show(result, as_json=as_json)


@_evaluate.command("decoder")
def evaluate_decoder(
    curated: Annotated[Path, typer.Argument(help="Folder that `curate` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for measures.json and the sheet.")],
    checkpoint: Annotated[str, typer.Option(help="The diffusion decoder.")],
    discrete_tokenizer: Annotated[str, typer.Option(help="The tokenizer whose tokens it decodes.")],
    tokenizer: Annotated[
        str, typer.Option(help="The continuous tokenizer: folder, hf:// address, or embedded name.")
    ] = "tokenizer_tiny",
    num_clips: Annotated[int, typer.Option(help="Held-out windows to decode.")] = 32,
    num_steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="g in cond + g (cond - uncond).")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: Json = False,
) -> None:
    """PSNR, SSIM and LPIPS-like of tokens decoded by the diffusion decoder, and by their own tokenizer."""
    from nemo_cosmos.generation.diffusion_decoder import DecodingConfig
    from nemo_cosmos.steps.evaluate_decoder import evaluate_decoder as run

    result = run(
        curated,
        output,
        checkpoint=checkpoint,
        discrete_tokenizer=discrete_tokenizer,
        tokenizer=tokenizer,
        decoding=DecodingConfig(num_steps=num_steps, guidance=guidance, seed=seed),
        num_clips=num_clips,
    )
    show(result, as_json=as_json)


@_evaluate.command("wfm")
def evaluate_wfm(
    curated: Annotated[Path, typer.Argument(help="Folder that `curate` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder to write predictions and measures to.")],
    checkpoint: Annotated[
        str, typer.Option(help="The post-trained WFM, diffusion or autoregressive.")
    ] = "diffusion_tiny_action",
    unconditional: Annotated[
        str | None,
        typer.Option(help="The WFM without first frame and actions; diffusion_tiny_text2world, none autoregressive."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder, hf:// address, or embedded name; the tiny one of the WFM's kind."),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(help="Cache an autoregressive WFM was trained on, to count token models on for bits per token."),
    ] = None,
    num_clips: Annotated[int, typer.Option(help="Held-out windows to predict.")] = 32,
    num_seeds: Annotated[int, typer.Option(help="Predictions of each window; measures are their means.")] = 1,
    as_json: Json = False,
) -> None:
    """Video prediction on held-out rollouts, beside repeating the last frame and an unconditional model.

    Of an autoregressive WFM also bits per token, beside unigram and bigram models of the tokens.
    """
    from nemo_cosmos.steps.evaluate_wfm import evaluate_wfm as run

    result = run(
        curated,
        output,
        checkpoint=checkpoint,
        unconditional=unconditional,
        tokenizer=tokenizer,
        latents=latents,
        num_clips=num_clips,
        num_seeds=num_seeds,
    )
    show(result, as_json=as_json)


@_guard.command("prompt")
def guard_prompt(prompt: Annotated[str, typer.Argument(help="The text.")], as_json: Json = False) -> None:
    """Judge a prompt; exit status 1 when a guard objects."""
    from nemo_cosmos.guardrail import PreGuard, is_safe

    verdicts = PreGuard.from_names().guard_prompt(prompt)
    show({v.guard: v.to_dict() for v in verdicts}, as_json=as_json)
    raise typer.Exit(0 if is_safe(verdicts) else 1)


@_guard.command("video")
def guard_video(
    video: Annotated[Path, typer.Argument(help="The video to judge.")],
    output: Annotated[Path, typer.Argument(help="Where to write it with faces pixelated.")],
    as_json: Json = False,
) -> None:
    """Judge a video and pixelate faces; exit status 1, and nothing written, when a guard objects."""
    from nemo_cosmos.guardrail import PostGuard, is_safe
    from nemo_cosmos.video_io import read_video, write_video

    frames, fps = read_video(video)
    frames, verdicts = PostGuard.from_names().guard_video(frames, fps)
    if is_safe(verdicts):
        write_video(output, frames, fps=fps)
    show({v.guard: v.to_dict() for v in verdicts}, as_json=as_json)
    raise typer.Exit(0 if is_safe(verdicts) else 1)
