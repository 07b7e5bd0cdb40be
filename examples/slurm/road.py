"""Submits the whole road to a Slurm cluster: every step is a recipe, every job waits for the ones it needs.

    python examples/slurm/road.py --size tiny --parts 8 --dryrun     # prints the sbatch scripts
    python examples/slurm/road.py --size 7b --parts 64 --nodes 8 --tokenizer /lustre/me/CV8x8x8-720p    # submits them

The cluster's account, partitions, image and mounts stand in the file of `NEMO_COSMOS_EXECUTORS` (conf/executors.yaml).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fiddle
import nemo_run as run

from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.embedded import embedded_path
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.tokenizer.published import config_told_by
from recipes import executors, registry


@dataclass(frozen=True, kw_only=True)
class Size:
    """What differs between a trial and the real thing."""

    pretrain: str
    finetune: str
    tokenizer: str | None
    """Name of embedded weights; None where the user must give one."""
    text_encoder: str
    num_frames: int
    height: int
    width: int
    is_multi_node: bool
    """Whether its training recipes take `num_nodes`."""


SIZES = {
    "tiny": Size(
        pretrain="diffusion_tiny_pretrain",
        finetune="diffusion_tiny_action_finetune",
        tokenizer="tokenizer_tiny",
        text_encoder="minilm-l6",
        num_frames=17,
        height=128,
        width=128,
        is_multi_node=False,
    ),
    "7b": Size(
        pretrain="diffusion_7b_pretrain",
        finetune="diffusion_7b_action_finetune",
        tokenizer=None,
        text_encoder="t5-11b",
        num_frames=57,
        height=512,
        width=640,
        is_multi_node=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe, where it runs, and what it waits for."""

    name: str
    recipe: run.Partial
    executor: run.Config
    after: tuple[str, ...] = ()


def road(size: Size, *, tokenizer: str, videos: str | None, runs: PurePosixPath, parts: int, nodes: int) -> list[Job]:
    """Returns the jobs in an order in which each comes after those that it waits for.

    Args:
        size: Which models, and the video size they take.
        tokenizer: Absolute path, as the containers see it, or the name of embedded weights.
        videos: Folder of raw videos; None collects the packaged clips and simulator rollouts first.
        runs: Where everything is written, as the containers see it.
        parts: Tasks of the array jobs.
        nodes: Of the trainings.

    Raises:
        UserError: This size trains on one node only.
    """
    if nodes > 1 and not size.is_multi_node:
        raise user_error("--nodes", nodes, "1 for this size", "Leave it out, or choose a larger size.")
    raw, curated, latents = videos or str(runs / "raw"), str(runs / "curated"), str(runs / "latents")
    jobs = []
    if videos is None:
        jobs.append(
            Job(name="collect", recipe=registry.find("collect")(output_dir=raw), executor=executors.slurm_cpu())
        )
    jobs += [
        Job(
            name="curate_parts",
            recipe=registry.find("curate_part")(input_dir=raw, output_dir=curated),
            executor=_array(executors.slurm_cpu(), parts),
            after=tuple(job.name for job in jobs),
        ),
        Job(
            name="curate",
            recipe=registry.find("curate")(input_dir=raw, output_dir=curated),
            executor=executors.slurm_cpu(),
            after=("curate_parts",),
        ),
        Job(
            name="tokenize",
            recipe=_tokenize(size, tokenizer, curated, latents),
            executor=_one_gpu(parts),
            after=("curate",),
        ),
    ]
    return jobs + _trainings(size, tokenizer, runs, curated, latents, nodes)


def _trainings(size: Size, tokenizer: str, runs: PurePosixPath, curated: str, latents: str, nodes: int) -> list[Job]:
    scale = {"num_nodes": nodes} if size.is_multi_node else {}
    pretrain = registry.find(size.pretrain)(latents=latents, directory=str(runs / "pretrain"), **scale)
    base = _last_checkpoint(pretrain)
    finetune = registry.find(size.finetune)(latents=latents, base=base, directory=str(runs / "finetune"), **scale)
    evaluate = registry.find("evaluate")(curated=curated, output=str(runs / "evaluation"))
    evaluate.checkpoint, evaluate.unconditional = _last_checkpoint(finetune), base
    evaluate.tokenizer = tokenizer
    evaluate.sampling.num_frames, evaluate.sampling.height, evaluate.sampling.width = (
        size.num_frames,
        size.height,
        size.width,
    )
    return [
        Job(name="pretrain", recipe=pretrain, executor=executors.slurm_for(pretrain), after=("tokenize",)),
        Job(name="finetune", recipe=finetune, executor=executors.slurm_for(finetune), after=("pretrain",)),
        Job(name="evaluate", recipe=evaluate, executor=_one_gpu(), after=("finetune",)),
    ]


def _tokenize(size: Size, tokenizer: str, curated: str, latents: str) -> run.Partial:
    recipe = registry.find("tokenize_part")(
        curated=curated, output=latents, tokenizer=tokenizer, text_encoder=size.text_encoder
    )
    recipe.config.num_frames, recipe.config.height, recipe.config.width = size.num_frames, size.height, size.width
    return recipe


def _last_checkpoint(training: run.Partial) -> str:
    """The name that the run's last checkpoint will have."""
    return f"{training.log.directory}/checkpoints/step={training.trainer.max_steps:07d}"


def _one_gpu(parts: int = 1) -> run.Config:
    executor = executors.slurm()
    executor.nodes = executor.ntasks_per_node = executor.gpus_per_node = 1
    executor.exclusive = None
    return _array(executor, parts) if parts > 1 else executor


def _array(executor: run.Config, parts: int) -> run.Config:
    executor.array = f"0-{parts - 1}"
    return executor


def check_tokenizer(tokenizer: str) -> None:
    """Refuses a tokenizer that the jobs could not load, before any of them has worked for it.

    Args:
        tokenizer: As for `road`.

    Raises:
        UserError: It is a relative path, is not there, or is in a format that must be converted first.
    """
    if "/" not in tokenizer:
        embedded_path(tokenizer)
        return
    if not PurePosixPath(tokenizer).is_absolute():
        raise user_error("--tokenizer", tokenizer, "an absolute path", "Give it as the containers see it.")
    settings = executors.read_settings("slurm", executors.SLURM_DEFAULTS)
    if settings["host"] is not None:
        print(f"{tokenizer}: cannot be checked from here, since jobs are submitted through ssh.", file=sys.stderr)
        return
    here = seen_here(PurePosixPath(tokenizer), settings["container_mounts"])
    convert = "nemo-cosmos convert MODEL_PT FOLDER --to nemo --preset CV8x8x8-720p"
    if not here.exists():
        fix = f"Mount it with container_mounts; a model.pt alone is converted by `{convert}`."
        raise user_error("--tokenizer", tokenizer, f"a folder, seen here as {here}", fix)
    if not _can_be_loaded(here):
        expected = "a NeMo checkpoint, a diffusers folder, a tokenizer folder or a published one under its own name"
        raise user_error("--tokenizer", tokenizer, expected, f"Convert it: `{convert}`.")


def _can_be_loaded(folder: Path) -> bool:
    try:
        found = detect(folder)
        return found is not Format.REFERENCE and (found is not Format.PUBLISHED or config_told_by(folder) is not None)
    except UserError:
        return False


def seen_here(path: PurePosixPath, mounts: list[str]) -> Path:
    """Where a path of the containers lies on this machine.

    Args:
        path: Absolute.
        mounts: As in `container_mounts`: host:container, perhaps with flags after a second colon.
    """
    for mount in mounts:
        host, _, rest = mount.partition(":")
        inside = rest.partition(":")[0] or host
        if path.is_relative_to(inside):
            return Path(host) / path.relative_to(inside)
    return Path(path)


def submit(jobs: list[Job], *, dryrun: bool) -> None:
    """Hands the jobs to Slurm, or prints their scripts."""
    with run.Experiment("nemo-cosmos-road") as experiment:
        ids: dict[str, str] = {}
        for job in jobs:
            ids[job.name] = experiment.add(
                job.recipe,
                executor=fiddle.build(job.executor),
                name=job.name,
                dependencies=[ids[name] for name in job.after],
            )
        if dryrun:
            experiment.dryrun()
        else:
            experiment.run(detach=True)


def _check_or_tell(tokenizer: str, *, dryrun: bool) -> None:
    """Scripts may be looked at on a machine that has no tokenizer."""
    try:
        check_tokenizer(tokenizer)
    except UserError as error:
        if not dryrun:
            raise
        print(f"Would not be submitted: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line and submits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny", help="which models (default: tiny)")
    parser.add_argument("--videos", help="folder of raw videos; without it they are collected")
    parser.add_argument(
        "--runs", type=PurePosixPath, default=PurePosixPath("/opt/nemo_cosmos/runs"), help="output folder"
    )
    parser.add_argument("--tokenizer", help="absolute path, as the containers see it; must be given for 7b")
    parser.add_argument("--parts", type=int, default=8, help="tasks of the array jobs")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the trainings")
    parser.add_argument("--dryrun", action="store_true", help="print the sbatch scripts instead of submitting")
    given = parser.parse_args(arguments)
    size = SIZES[given.size]
    tokenizer = given.tokenizer or size.tokenizer
    if tokenizer is None:
        parser.error(f"--size {given.size} needs --tokenizer: an absolute path, as the containers see it.")
    try:
        jobs = road(
            size, tokenizer=tokenizer, videos=given.videos, runs=given.runs, parts=given.parts, nodes=given.nodes
        )
        _check_or_tell(tokenizer, dryrun=given.dryrun)
        submit(jobs, dryrun=given.dryrun)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
