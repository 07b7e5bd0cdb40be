"""A diffusion decoder made of a diffusion WFM: from discrete tokens, what their continuous latents would be.

Source: `cosmos_diffusiondecoder_7b.py` of NVIDIA cosmos-predict1, which post-trains the 7B Text2World.
"""

from __future__ import annotations

from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.pixel_loss import PixelLoss
from nemo_cosmos.autoregressive.diffusion_decoder.step import DiffusionDecoderModel
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.objective import EDM


def diffusion_decoder(
    config: DiffusionDecoderConfig,
    *,
    edm: EDM | None = None,
    base: str | None = None,
    token_dropout: float = 0.2,
    text_dropout: float = 0.2,
    seed: int = 1234,
    pixel_loss: PixelLoss | None = None,
) -> DiffusionDecoderModel:
    """The model and its training.

    Args:
        config: The network.
        edm: Preconditioning and law of the noise levels; the published ones when absent.
        base: Safetensors file or NeMo checkpoint of a diffusion WFM of the same size; None starts anew.
        token_dropout: Probability of hiding a sample's tokens, for guidance.
        text_dropout: Probability of replacing a sample's text states by zeros.
        seed: Of all random draws.
        pixel_loss: Compares what is decoded from the estimates, besides; not in the published training.

    Returns:
        The LightningModule.
    """
    conditioning = ConditioningConfig(text_dropout=text_dropout, condition_dropout=token_dropout)
    return DiffusionDecoderModel(
        config, edm=edm, conditioning=conditioning, init_from=base, seed=seed, pixel_loss=pixel_loss
    )
