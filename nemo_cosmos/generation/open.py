"""Putting a world model together from its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_cosmos.checkpoints.load import load_network, load_tokenizer
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.errors import user_error
from nemo_cosmos.generation.world_model import WorldModel
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.text import TEXT_ENCODERS, load_text_encoder


@contextlib.contextmanager
def open_world_model(checkpoint: str | Path, tokenizer: str | Path) -> Iterator[WorldModel]:
    """Loads a WFM, its tokenizer and its text encoder onto this rank's device, for the time of the block.

    On a GPU the network runs in bf16, as it was trained; on the CPU in float32.

    Args:
        checkpoint: A NeMo checkpoint with a card, or the name of embedded weights.
        tokenizer: Anything `load_tokenizer` takes.

    Yields:
        The model; Megatron's process groups stay open until the block ends.

    Raises:
        UserError: Something is missing or does not fit together.
    """
    with initialize():
        network, card = load_network(checkpoint)
        device = current_device()
        yield WorldModel(
            network=network.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else None),
            tokenizer=load_tokenizer(tokenizer).model.to(device),
            text_encoder=load_text_encoder(_text_encoder_of(card, network.config.crossattn_emb_channels)).to(device),
            card=card,
            edm=EDM(),
        )


def _text_encoder_of(card: CheckpointCard, width: int) -> str:
    """The encoder that the card names, else the only one of the network's width."""
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
