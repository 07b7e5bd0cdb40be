"""Where this rank stands in the pipeline."""

from __future__ import annotations

from megatron.core import parallel_state


def stage_ends(vp_stage: int | None) -> dict[str, bool]:
    """Whether a model chunk of this rank is the first, and the last, of the pipeline.

    Args:
        vp_stage: Virtual stage, where the pipeline is interleaved.

    Returns:
        `pre_process` and `post_process`, as Megatron's models take them.
    """
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    }
