"""What the causal layers remember of a video that comes chunk by chunk.

A layer that looks back takes a `CausalCache` with its input, or None for a whole video in one pass. It asks
`starts_video` whether it stands at the video's beginning, where the first frame has its own rule, and otherwise
recalls the frames that it kept. No other layer knows of chunks.
"""

from __future__ import annotations

from torch import Tensor, nn

from nemo_cosmos.errors import user_error


class CausalCache:
    """Past of one video in one encoder or decoder: per layer the last inputs that later frames still depend on.

    A convolution over time keeps the one or two frames that its kernel reaches back. Temporal attention sees all
    frames before, hence keeps the key and the value of each: 2 x channels numbers per pixel and latent frame, the one
    part that grows with the video.

    Args:
        max_attended_frames: Latent frames that temporal attention sees, the present one included. None for all, which
            is what the models are trained with; a number bounds the memory and is no longer exact.

    Raises:
        UserError: The number is below one.
    """

    def __init__(self, *, max_attended_frames: int | None = None) -> None:
        if max_attended_frames is not None and max_attended_frames < 1:
            raise user_error("max_attended_frames", max_attended_frames, "at least 1, or None for all", "Raise it.")
        self.max_attended_frames = max_attended_frames
        self.at_start = True
        self._past: dict[nn.Module, tuple[Tensor, ...]] = {}

    def remember(self, layer: nn.Module, *past: Tensor) -> None:
        """Keeps tensors for the layer's next chunk in place of those before."""
        self._past[layer] = past

    def recall(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """Returns what the layer kept last."""
        return self._past[layer]

    def end_chunk(self) -> None:
        """Says that every layer has seen the chunk; what follows continues it."""
        self.at_start = False


def starts_video(cache: CausalCache | None) -> bool:
    """Tells whether the input of a layer begins with the video's first frame."""
    return cache is None or cache.at_start
