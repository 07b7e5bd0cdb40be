"""Which diffusion decoder reference weights are, told by their names and shapes.

The released one is Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p (Cosmos-1.0-Diffusion-7B-Decoder-...); it holds
no configuration.
"""

from __future__ import annotations

from nemo_cosmos.autoregressive.diffusion_decoder.config import PRESETS, DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.state_dict import REFERENCE
from nemo_cosmos.diffusion.published import told_by_shapes
from nemo_cosmos.errors import user_error
from nemo_cosmos.weight_files.stored_tensor import Weights


def is_reference(weights: Weights) -> bool:
    """Tells whether weights have a diffusion decoder's names of the reference."""
    return REFERENCE in weights


def config_of_reference(weights: Weights, preset: str | None = None) -> DiffusionDecoderConfig:
    """The configuration of reference weights.

    Args:
        weights: Under the reference's names.
        preset: The model's name in `PRESETS`; None is the published one.

    Raises:
        UserError: A weight that tells the architecture is missing, or the preset has other shapes.
    """
    vocab_size, channels = weights[REFERENCE].shape
    told = told_by_shapes(weights, more_channels=channels)
    told |= {"token_vocab_size": vocab_size, "token_emb_channels": channels}
    name = preset or "diffusion_decoder_7b"
    config = PRESETS[name](concat_condition_mask=told["concat_condition_mask"])
    if any(getattr(config, field) != value for field, value in told.items()):
        raise user_error(
            "reference weights",
            told,
            f"the shapes of {name}",
            "Put the card that conversion wrote beside the file, or choose the model: --preset "
            f"{', '.join(sorted(PRESETS))}.",
        )
    return config
