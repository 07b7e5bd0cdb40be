"""How to sample: sizes, what noise or tokens are drawn by, and seed, with each model's own defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from nemo_cosmos.autoregressive.token_sampling import TokenSampling
from nemo_cosmos.diffusion.samplers import SAMPLERS, FinalSigma, karras_sigmas
from nemo_cosmos.errors import user_error

if TYPE_CHECKING:
    import torch

    from nemo_cosmos.autoregressive.config import ARConfig
    from nemo_cosmos.diffusion.config import DiTConfig

Speculation = Literal["medusa", "previous_frame", "none"]
"""Ways to guess tokens ahead, see `nemo_cosmos.autoregressive.speculation`; they change no token."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample; sizes are those of the output video. Fields that are None take the model's own value.

    `for_diffusion` and `for_autoregressive` fill them in, see `PUBLISHED`, `TINY`, `TINY_ACTION`,
    `PUBLISHED_AUTOREGRESSIVE` and `TINY_AUTOREGRESSIVE`; they refuse what only the other family takes.
    """

    num_frames: int | None = None
    """1 + k times the tokenizer's temporal compression."""
    height: int | None = None
    """Pixels; what does not fill whole tokens is generated and cut off."""
    width: int | None = None
    """Pixels."""
    fps: float | None = None
    num_steps: int | None = None
    """Diffusion, as all up to `input_frames_guidance`. Denoising steps: network calls of every sampler but `heun`,
    which makes two in each step but the last."""
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
    temperature: float | None = None
    """Autoregressive, as all up to `compile`. Divides the logits; 0 takes the likeliest token."""
    top_p: float | None = None
    """Admits the fewest tokens, likeliest first, whose probabilities exceed this; 1 admits all."""
    top_k: int | None = None
    """Admits this many of the likeliest tokens; None admits all."""
    speculation: Speculation | None = None
    """How tokens are guessed ahead: by the frame before, where nothing else is said."""
    compile: bool = False
    """Whether decoding steps run through `torch.compile`, on GPUs in CUDA graphs; building them takes minutes."""
    chunk_frames: int | None = None
    """Frames generated at once; a longer video is generated chunk by chunk. A diffusion WFM generates all at once where
    this is None, an autoregressive one as many as it was trained on."""
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
        if self.speculation not in (None, *get_args(Speculation)):
            raise user_error("speculation", self.speculation, f"one of {get_args(Speculation)}", "Choose one of them.")
        TokenSampling(
            temperature=1.0 if self.temperature is None else self.temperature, top_p=self.top_p, top_k=self.top_k
        )
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

    def for_diffusion(self, config: DiTConfig, levels: dict[str, Any] | None = None) -> Self:
        """Fills fields that are None with the values of a diffusion WFM.

        Args:
            config: The network.
            levels: Noise levels that its checkpoint names, which go before those of the model's size.

        Raises:
            UserError: A field is set that it does not take.
        """
        published = (config.num_layers, config.hidden_size) in _PUBLISHED_SIZES
        tiny = TINY if config.action_dim is None else TINY_ACTION
        defaults = {**(PUBLISHED if published else tiny), **(levels or {})}
        return self._filled(defaults, without=_OF_AUTOREGRESSIVE, reason="a diffusion WFM draws no tokens")

    def for_autoregressive(self, config: ARConfig) -> Self:
        """Fills fields that are None with the values of an autoregressive WFM.

        Args:
            config: The network.

        Raises:
            UserError: A field is set that it does not take, or it has no Medusa heads to guess with.
        """
        published = (config.num_layers, config.hidden_size) in _PUBLISHED_AUTOREGRESSIVE_SIZES
        defaults = PUBLISHED_AUTOREGRESSIVE if published else TINY_AUTOREGRESSIVE
        if self.speculation == "medusa" and not config.num_medusa_heads:
            expected = "'previous_frame' or 'none', for this WFM has no Medusa heads"
            raise user_error("speculation", self.speculation, expected, "Choose one of these.")
        return self._filled(defaults, without=_OF_DIFFUSION, reason="an autoregressive WFM denoises nothing")

    def _filled(self, defaults: dict[str, Any], *, without: tuple[str, ...], reason: str) -> Self:
        for name in without:
            value = getattr(self, name)
            if value is not None and value is not False:
                raise user_error(name, value, f"none, for {reason}", "Leave it out, or choose another checkpoint.")
        return dataclasses.replace(
            self, **{name: value for name, value in defaults.items() if getattr(self, name) is None}
        )

    def token_sampling(self) -> TokenSampling:
        """How a complete configuration draws tokens."""
        return TokenSampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

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

TINY_ACTION: dict[str, Any] = {**TINY, "num_steps": 2, "sigma_min": 8.0}
"""Defaults of all other sizes with actions: first frame and actions leave little to draw, and their recipe trains above
this level."""

_PUBLISHED_SIZES = ((28, 4096), (36, 5120))
"""Layers and hidden size of the 7B and the 14B."""

PUBLISHED_AUTOREGRESSIVE: dict[str, Any] = {
    "num_frames": 33,
    "height": 640,
    "width": 1024,
    "fps": 25.0,
    "chunk_frames": 33,
    "temperature": 1.0,
    "top_p": 0.8,
    "speculation": "previous_frame",
}
"""Defaults of the published autoregressive sizes, with text or without.

Source: the command line of NVIDIA cosmos-predict1, `autoregressive/inference`.
"""

TINY_AUTOREGRESSIVE: dict[str, Any] = {
    **PUBLISHED_AUTOREGRESSIVE,
    "num_frames": 17,
    "height": 128,
    "width": 128,
    "fps": 10.0,
    "chunk_frames": 17,
}
"""Defaults of all other autoregressive sizes."""

_PUBLISHED_AUTOREGRESSIVE_SIZES = ((16, 4096), (40, 5120))
"""Layers and hidden size of the 4B and 5B, and of the 12B and 13B."""

_OF_DIFFUSION = ("num_steps", "sampler", "guidance", "sigma_max", "sigma_min", "final_sigma", "input_frames_guidance")
_OF_AUTOREGRESSIVE = ("temperature", "top_p", "top_k", "speculation", "compile")
"""Fields that one family alone takes."""
