"""Networks that say in one vector what a clip shows."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from curator_stages.config import EFFICIENTNET, CurationConfig
from curator_stages.threads import one_thread
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.image_features import load_efficientnet, network_input


class VideoEmbedder(Protocol):
    """What `EmbedStage` asks of a network."""

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 RGB [T, H, W, 3] -> float32 [D], L2 norm 1."""
        ...


def make_embedder(config: CurationConfig) -> VideoEmbedder:
    """Loads the network that the config names.

    Raises:
        UserError: Its package, its weights or the device is missing.
    """
    if config.embedding_model == EFFICIENTNET:
        return EfficientNetEmbedder(config.embed_frames, config.device)
    return CosmosEmbed1(config.embedding_model, config.device)


def embedding_dim(config: CurationConfig) -> int:
    """Returns how many numbers an embedding has; of Cosmos-Embed1 those of the largest."""
    return 1280 if config.embedding_model == EFFICIENTNET else 768


class EfficientNetEmbedder:
    """The mean of EfficientNet-lite0 features over evenly spaced frames."""

    def __init__(self, num_frames: int, device: str) -> None:
        """Loads the network; `num_frames` is how many frames of a clip are looked at."""
        self._network, self._num_frames, self._device = load_efficientnet(device), num_frames, device

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 RGB [T, H, W, 3] -> float32 [1280], L2 norm 1."""
        import torch

        chosen = np.unique(np.linspace(0, len(frames) - 1, self._num_frames).round().astype(int))
        pixels = network_input(frames[chosen]).to(self._device)
        with one_thread(), torch.inference_mode():
            features = self._network.extract_features(pixels).mean((0, 2, 3))
        return (features / features.norm()).cpu().numpy()


class CosmosEmbed1:
    """NVIDIA's Cosmos-Embed1 by Hugging Face transformers, with the code that comes with its weights.

    Source: https://huggingface.co/nvidia/Cosmos-Embed1-224p (`get_video_embeddings`, `visual_proj`), as NeMo-Curator's
    `models.cosmos_embed1` calls it.
    """

    def __init__(self, model: str, device: str) -> None:
        """Loads the model.

        Args:
            model: Folder, or name on the Hugging Face hub (`HF_HUB_OFFLINE` is respected); its code is run.
            device: Torch device; bf16 on a GPU, float32 on a CPU.

        Raises:
            UserError: transformers, the model or the device is missing.
        """
        import torch
        from transformers import AutoModel, AutoProcessor

        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise user_error("device", device, "a device of this machine", "There is no CUDA device here: use 'cpu'.")
        self._device, self._dtype = device, torch.bfloat16 if on_gpu else torch.float32
        try:
            network: Any = AutoModel.from_pretrained(model, trust_remote_code=True)
            self._processor: Any = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"embedding_model: {model!r} cannot be loaded ({error}). "
                f"Give {EFFICIENTNET!r}, or a folder or hub name of Cosmos-Embed1."
            ) from error
        self._network = network.to(device, dtype=self._dtype).eval()

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 RGB [T, H, W, 3] -> float32 [D], L2 norm 1; as many frames are looked at as the model asks for."""
        import torch

        places = np.linspace(0, len(frames) - 1, self._processor.num_video_frames).round().astype(int)
        shown = frames[places].transpose(0, 3, 1, 2)[None]
        with torch.inference_mode():
            videos = self._processor(videos=shown, return_tensors="pt")["videos"].to(self._device, self._dtype)
            (vector,) = self._network.get_video_embeddings(videos=videos).visual_proj.float()
            return torch.nn.functional.normalize(vector, dim=-1).cpu().numpy()
