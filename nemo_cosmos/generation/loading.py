"""What the parts of a WFM and of a diffusion decoder have in common when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from megatron.core.transformer.module import MegatronModule

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import user_error
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.fsdp import shard_weights
from nemo_cosmos.text import TEXT_ENCODERS

Network = TypeVar("Network", bound=MegatronModule)


def place_network(network: Network, layout: GenerationLayout) -> Network:
    """Puts this rank's part on its device, in the dtype that it computes in, and shares out its weights if asked."""
    device = current_device()
    network = network.to(dtype=torch.bfloat16 if device.type == "cuda" else None)
    if not layout.shard_weights:
        return network.to(device)
    shard_weights(network, network.groups.dp_cp)
    return network


def text_encoder_of(card: CheckpointCard, width: int) -> str:
    """The encoder that the card names, by its own name or by its folder, else the only one of the network's width."""
    if card.text_encoder is not None and Path(card.text_encoder).is_dir():
        return card.text_encoder
    fitting = [name for name, config in TEXT_ENCODERS.items() if config.dim == width]
    if card.text_encoder in fitting:
        return card.text_encoder
    if card.text_encoder is None and len(fitting) == 1:
        return fitting[0]
    raise user_error(
        f"text encoder of {card.model}",
        card.text_encoder or f"no name, and {fitting} of the network's width {width}",
        f"the name of one whose states are {width} wide: {fitting}",
        "Write it into the checkpoint's card.json as text_encoder.",
    )
