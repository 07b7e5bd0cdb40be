"""Captions by Hugging Face transformers: models of the Qwen-VL class, such as Qwen2.5-VL and Cosmos-Reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from curator_stages.captioning.captioner import Answer, CaptionRequest
from curator_stages.config import CurationConfig
from nemo_cosmos.errors import UserError, user_error

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

_IMAGE = "<|image_pad|>"


def check_model(model: str) -> None:
    """Makes sure that a model is there and of a class that is known here; only its config is fetched.

    Raises:
        UserError: transformers or the model is missing, or it is of another class.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UserError("captioner: `transformers:` needs the package transformers. Install it.") from error
    try:
        kind = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise UserError(
            f"captioner: {model!r} cannot be loaded ({error}). Give a folder or a name on the Hugging Face hub, or "
            "choose `none` to leave clips without captions."
        ) from error
    if kind not in MODEL_TYPES:
        raise user_error("captioner", f"{model} of class {kind}", f"one of {MODEL_TYPES}", "Others run by `vllm:`.")


class TransformersCaptioner:
    """Greedy decoding in batches. Frames go in as pictures, so that torchvision is not needed."""

    def __init__(self, config: CurationConfig, model: str) -> None:
        """Loads the model.

        Args:
            config: `device`, `caption_batch` and `caption_max_tokens` count here.
            model: Folder, or name on the Hugging Face hub.

        Raises:
            UserError: transformers, the model or the device is missing, or the model is of another class.
        """
        check_model(model)
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        device = torch.device(config.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise user_error("device", config.device, "a device of this machine", "There is no CUDA device: use 'cpu'.")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        self._model = network.to(device).eval()
        # The fast image processor needs torchvision; results differ by rounding only.
        self._images: Any = AutoImageProcessor.from_pretrained(model, use_fast=False)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._device, self._batch, self._max_tokens = device, config.caption_batch, config.caption_max_tokens

    def caption(self, requests: Sequence[CaptionRequest]) -> dict[str, Answer]:
        """Answers requests, `caption_batch` of them at a time."""
        answers: dict[str, Answer] = {}
        for start in range(0, len(requests), self._batch):
            batch = requests[start : start + self._batch]
            answers.update(zip([r.key for r in batch], self._answer(batch), strict=True))
        return answers

    def _answer(self, requests: Sequence[CaptionRequest]) -> list[str]:
        import torch

        with torch.inference_mode():
            inputs = self._inputs(requests)
            tokens = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(new, skip_special_tokens=True)

    def _inputs(self, requests: Sequence[CaptionRequest]) -> dict[str, torch.Tensor]:
        """Texts with as many image tokens as each picture takes, and the patches of all pictures in a row."""
        pictures = self._images(images=[frame for r in requests for frame in r.frames], return_tensors="pt")
        counts = iter((pictures["image_grid_thw"].prod(dim=1) // self._images.merge_size**2).tolist())
        texts = []
        for request in requests:
            content = [*({"type": "image"} for _ in request.frames), {"type": "text", "text": request.prompt}]
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            before, *after = text.split(_IMAGE)
            texts.append(before + "".join(_IMAGE * next(counts) + part for part in after))
        tokens = self._tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")
        return {name: value.to(self._device) for name, value in {**tokens, **pictures}.items()}
