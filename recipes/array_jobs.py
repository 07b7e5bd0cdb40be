"""Steps as Slurm array jobs: every task takes the share of the work that its place in the array gives it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cosmos.errors import user_error

if TYPE_CHECKING:
    from curator_stages.config import CurationConfig
    from nemo_cosmos.contracts import LatentCacheCard
    from nemo_cosmos.data.latent_cache import LatentCacheConfig


def array_place() -> tuple[int, int]:
    """Returns this task's number, from 0, and the number of tasks; (0, 1) outside an array job.

    Raises:
        UserError: The array is not numbered from 0 on.
    """
    part = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    num_parts = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    if not 0 <= part < num_parts:
        expected = f"0 to {num_parts - 1}"
        raise user_error("SLURM_ARRAY_TASK_ID", part, expected, f"Submit with --array=0-{num_parts - 1}.")
    return part, num_parts


def curate_part(
    input_dir: str | Path, output_dir: str | Path, config: CurationConfig, executor: str = "in_process"
) -> int:
    """Does a curation's per-video work for this task's share of the videos.

    NeMo-Curator shares the work out by Slurm's variables. Results go to the work folder of `output_dir`, where `curate`
    on the same folders finds them and has only the work left that needs all clips at once. Tasks share no file, so they
    need no order and may be repeated.

    Args:
        input_dir: Folder with all videos.
        output_dir: The curated folder, the same for all tasks.
        config: Settings, the same for all tasks and for `curate`.
        executor: As for `curate`.

    Returns:
        Number of pieces of video that this call did; those finished earlier, and those that killed their worker twice
        and so are rejected until the next call, are not counted.

    Raises:
        UserError: There is no video, or the array is not numbered from 0 on.
    """
    from curator_stages.pipeline import clips_pipeline, run_clips, with_whole_paths
    from curator_stages.sources import absolute

    array_place()
    config = with_whole_paths(config)
    output = str(Path(output_dir).resolve())
    pipeline = clips_pipeline(absolute(input_dir), output, config)
    return len(run_clips(pipeline, executor, output, config, progress=True))


def tokenize_part(
    curated: str | Path,
    output: str | Path,
    *,
    tokenizer: str,
    text_encoder: str,
    config: LatentCacheConfig,
) -> LatentCacheCard | None:
    """Writes this task's share of the shards of a latent cache; the task that ends last writes the card.

    Arguments and errors are those of `nemo_cosmos.steps.tokenize.tokenize`.
    """
    from nemo_cosmos.steps.tokenize import tokenize

    array_place()
    return tokenize(curated, output, tokenizer=tokenizer, text_encoder=text_encoder, config=config)
