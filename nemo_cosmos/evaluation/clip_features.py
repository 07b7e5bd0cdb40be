"""Short clips as feature vectors, for a Fréchet distance in the style of FVD.

FVD's network, I3D trained on Kinetics, comes with no package. In its place stands an image network whose weights do,
EfficientNet-lite0, and what it gives per frame is summed up over the clip in two halves: the mean over the frames says
what is seen, the mean change from frame to frame says how steady it is. So flicker counts, as it does for I3D; the
order of the frames beyond neighbours does not. Distances compare with each other and not with published FVD or rFVD.
"""

from __future__ import annotations

import numpy as np
import torch

from nemo_cosmos.errors import user_error
from nemo_cosmos.image_features import load_efficientnet, network_input

CLIP_FRAMES = 16
"""Frames per clip, as FVD takes them."""
FEATURES = (
    "EfficientNet-lite0 (ImageNet) on frames resized to 224x224; mean over 16 frames and mean absolute change between "
    "neighbours"
)
"""What a distance on these features must be told with."""

_BATCH = 8


class ClipFeatures:
    """The feature network, on one device."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """Loads the network.

        Raises:
            UserError: Its packages are missing.
        """
        self._device = torch.device(device)
        # Channels last is the faster layout of its convolutions, on CPUs twice as fast.
        self._network = load_efficientnet(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Describes one clip; a single picture changes by nothing.

        Args:
            frames: uint8 [T, H, W, 3], T >= 1.

        Returns:
            float64 [2560].

        Raises:
            UserError: The frames are of another shape or dtype.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.size == 0:
            raise user_error("clip", f"{frames.dtype} {frames.shape}", "uint8 [T, H, W, 3], T >= 1", "Convert it.")
        pieces = []
        for start in range(0, len(frames), _BATCH):
            pixels = network_input(frames[start : start + _BATCH]).to(self._device, memory_format=torch.channels_last)
            pieces.append(self._network.extract_features(pixels).mean((2, 3)).double().cpu())
        features = torch.cat(pieces)
        change = features.diff(dim=0).abs().sum(0) / max(1, len(features) - 1)
        return torch.cat([features.mean(0), change]).numpy()
