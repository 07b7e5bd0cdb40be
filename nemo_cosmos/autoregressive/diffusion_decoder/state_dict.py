"""Weight names: those of the diffusion WFM, and the tokens' embedding.

Values are moved, never computed with, so a round trip is exact to the bit. diffusers has no such model.
"""

from __future__ import annotations

from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.diffusion import state_dict as dit
from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.stored_tensor import Weights

OURS, REFERENCE = "token_embedder.weight", "net.token_embedder.weight"


def leaving(weights: Weights, config: DiffusionDecoderConfig) -> Weights:
    """Our weights under the reference's names, each moved when it is read.

    Raises:
        UserError: A weight is missing or unknown.
    """
    others, embedding = _apart(weights, OURS)
    return {**dit.leaving(others, config, "reference"), **{REFERENCE: embedding}}


def entering(weights: Weights, config: DiffusionDecoderConfig) -> Weights:
    """The reference's weights under our names, each moved when it is read.

    Raises:
        UserError: A weight is missing or unknown.
    """
    others, embedding = _apart(weights, REFERENCE)
    return {**dit.entering(others, config, "reference"), **{OURS: embedding}}


def _apart(weights: Weights, name: str) -> tuple[Weights, object]:
    if name not in weights:
        raise UserError(f"weights of a diffusion decoder: {name} is missing. Fetch the file again if it is damaged.")
    return {other: weight for other, weight in weights.items() if other != name}, weights[name]
