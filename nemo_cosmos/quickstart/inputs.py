"""A first frame, actions and a prompt for the quickstart's own video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.steps.heldout import held_out_windows


@dataclass(frozen=True, kw_only=True)
class GenerationInputs:
    """Files for `nemo-cosmos generate`."""

    prompt: str
    first_frame: Path
    actions: Path


def write_generation_inputs(curated: Path, folder: Path) -> GenerationInputs:
    """Writes the first frame and the actions of the first held-out window.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        folder: Where to write.
    """
    import cv2

    window = held_out_windows(
        curated, num_windows=1, num_frames=17, height=128, width=128, with_actions=True, sources=("street",)
    )[0]
    first_frame, actions = folder / "first_frame.png", folder / "actions.json"
    with written_aside(first_frame) as aside:
        cv2.imwrite(str(aside), window.frames[0, ..., ::-1])
    write_json(actions, window.actions.tolist())
    return GenerationInputs(prompt=window.caption, first_frame=first_frame, actions=actions)
