"""How to sample: sizes, steps, guidance and seed, with each model's own defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from nemo_cosmos.diffusion.samplers import SAMPLERS, FinalSigma, karras_sigmas
from nemo_cosmos.errors import user_error

if TYPE_CHECKING:
    import torch

    from nemo_cosmos.diffusion.config import DiTConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample; sizes are those of the output video. Fields that are None take the model's own value.

    `for_model` fills them in: see `PUBLISHED` and `TINY`.
    """

    num_frames: int | None = None
    """1 + k times the tokenizer's temporal compression."""
    height: int | None = None
    """Pixels; what does not fill whole tokens is generated and cut off."""
    width: int | None = None
    """Pixels."""
    fps: float | None = None
    num_steps: int | None = None
    """Denoising steps: network calls of every sampler but `heun`, which makes two in each step but the last."""
    sampler: str | None = None
    """One of `nemo_cosmos.diffusion.samplers.SAMPLERS`."""
    guidance: float | None = None
    """g in cond + g (cond - uncond); diffusers' `guidance_scale`."""
    sigma_max: float | None = None
    """First noise level."""
    sigma_min: float | None = None
    """Last noise level before the clean end."""
    final_sigma: FinalSigma | None = None
    """Whether a run goes on from `sigma_min` to the clean end."""
    input_frames_guidance: bool = False
    """Whether the branch that guidance moves away from lacks the given frames, and not the text alone."""
    chunk_frames: int | None = None
    """Frames generated at once; a longer video is generated chunk by chunk. None generates all at once."""
    overlap_frames: int = 1
    """Last frames of a chunk that the next one is given; 1 + k times the temporal compression."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses unknown samplers and impossible numbers.

        Raises:
            UserError: A value cannot be.
        """
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise user_error("sampler", self.sampler, f"one of {sorted(SAMPLERS)}", "Choose one of them.")
        if self.guidance is not None and self.guidance < 0:
            raise user_error("guidance", self.guidance, "0 or more", "Correct it; 0 is none.")
        if self.fps is not None and self.fps <= 0:
            raise user_error("fps", self.fps, "a positive number", "Correct it.")
        if self.chunk_frames is not None and not 1 <= self.overlap_frames < self.chunk_frames:
            raise user_error(
                "overlap_frames, chunk_frames",
                (self.overlap_frames, self.chunk_frames),
                "1 <= overlap_frames < chunk_frames",
                "Longer chunks, or a shorter overlap.",
            )

    def for_model(self, config: DiTConfig, levels: dict[str, Any] | None = None) -> Self:
        """Fills fields that are None with the model's own values.

        Args:
            config: The network.
            levels: Noise levels that its checkpoint names, which go before those of the model's size.
        """
        published = (config.num_layers, config.hidden_size) in _PUBLISHED_SIZES
        defaults = {**(PUBLISHED if published else TINY), **(levels or {})}
        return dataclasses.replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )

    def sigmas(self) -> torch.Tensor:
        """The noise levels of a complete configuration; see `karras_sigmas`."""
        return karras_sigmas(
            self.num_steps, sigma_max=self.sigma_max, sigma_min=self.sigma_min, final_sigma=self.final_sigma
        )


_LEVELS: dict[str, Any] = {"sigma_max": 80.0, "sigma_min": 0.002, "final_sigma": "zero"}

PUBLISHED: dict[str, Any] = {
    "num_frames": 121,
    "height": 704,
    "width": 1280,
    "fps": 24.0,
    "num_steps": 36,
    "sampler": "res_2ab",
    "guidance": 7.0,
    **_LEVELS,
}
"""Defaults of the published sizes: RES multistep with the reference's 35 steps and its clean last one.

Source: `Sampler.forward` of `res_sampler.py` for sampler, steps and noise levels, the command line for the rest, of
NVIDIA cosmos-predict1, whose own inference takes 35 steps of `EDMEulerScheduler` instead.
"""

TINY: dict[str, Any] = {
    "num_frames": 17,
    "height": 128,
    "width": 128,
    "fps": 10.0,
    "num_steps": 4,
    "sampler": "euler",
    "guidance": 0.0,
    **_LEVELS,
}
"""Defaults of all other sizes. Each step adds the error of a small network, and few give nearly the mean of what may
come."""

_PUBLISHED_SIZES = ((28, 4096), (36, 5120))
"""Layers and hidden size of the 7B and the 14B."""
