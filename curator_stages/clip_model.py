"""CLIP by Hugging Face transformers: what pictures and sentences have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_cosmos.errors import UserError, user_error

if TYPE_CHECKING:
    import torch


class ClipModel:
    """Embeds pictures and sentences into one space.

    Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision",
    https://arxiv.org/abs/2103.00020.
    """

    def __init__(self, model: str, device: str) -> None:
        """Loads the model.

        Args:
            model: Folder, or name on the Hugging Face hub (`HF_HUB_OFFLINE` is respected).
            device: Torch device.

        Raises:
            UserError: transformers, the model or the device is missing.
        """
        import torch

        try:
            from transformers import AutoTokenizer, CLIPImageProcessor
            from transformers import CLIPModel as Network
        except ImportError as error:
            raise UserError("CLIP: needs the package transformers. Install it.") from error
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise user_error("device", device, "a device of this machine", "There is no CUDA device here: use 'cpu'.")
        try:
            self._network: Any = Network.from_pretrained(model).to(device).eval()
            self._images: Any = CLIPImageProcessor.from_pretrained(model)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"clip_model: {model!r} cannot be loaded ({error}). Give a folder or a hub name."
            ) from error
        self._device = device

    def embed_pictures(self, pictures: list[np.ndarray]) -> torch.Tensor:
        """uint8 RGB [H, W, 3] each -> float [N, D], L2 norm 1."""
        import torch

        with torch.inference_mode():
            pixels = self._images(images=pictures, return_tensors="pt").to(self._device)
            return torch.nn.functional.normalize(self._network.get_image_features(**pixels).float(), dim=-1)

    def embed_sentences(self, sentences: list[str]) -> torch.Tensor:
        """Returns float [N, D], L2 norm 1."""
        import torch

        with torch.inference_mode():
            longest = self._network.config.text_config.max_position_embeddings
            tokens = self._tokenizer(
                sentences, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(self._device)
            features = self._network.get_text_features(tokens["input_ids"], tokens["attention_mask"])
            return torch.nn.functional.normalize(features.float(), dim=-1)

    @property
    def temperature(self) -> float:
        """What cosines are multiplied by before a softmax."""
        return float(self._network.logit_scale.exp())
