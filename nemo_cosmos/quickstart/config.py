"""How much the quickstart does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_cosmos.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much each step does."""

    num_street: int
    num_arm: int
    num_heldout: int
    """Held-out rollouts of each simulator."""
    num_multiview: int
    tokenizer_steps: int
    pretrain_steps: int
    finetune_steps: int
    num_eval_clips: int


WARM = Budget(
    num_street=16,
    num_arm=14,
    num_heldout=16,
    num_multiview=1,
    tokenizer_steps=40,
    pretrain_steps=60,
    finetune_steps=60,
    num_eval_clips=32,
)
"""Starts from the embedded weights; five to ten minutes on two cores."""

FROM_SCRATCH = Budget(
    num_street=240,
    num_arm=240,
    num_heldout=16,
    num_multiview=2,
    tokenizer_steps=3000,
    pretrain_steps=2000,
    finetune_steps=8000,
    num_eval_clips=32,
)
"""Trains anew, as the embedded weights began (docs/weights.md); up to two hours on two cores of a recent CPU."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """What the command line gives."""

    output: Path
    """All that is made goes here; the same folder again goes on where it stopped."""
    videos: Path | None = None
    """The user's own videos instead of the packaged clips."""
    from_scratch: bool = False
    seed: int = 0
    workers: int = 2
    """Simulator processes."""

    def __post_init__(self) -> None:
        """Refuses a folder of videos that is not there, before any work.

        Raises:
            UserError: `videos` is no folder.
        """
        if self.videos is not None and not self.videos.is_dir():
            raise UserError(
                f"--videos {self.videos}: no such folder. Give a folder of mp4, mov, mkv, avi or webm files."
            )

    @property
    def budget(self) -> Budget:
        """How much each step does."""
        return FROM_SCRATCH if self.from_scratch else WARM
