"""Opening and converting a diffusion decoder, weight by weight: few of them are in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from nemo_cosmos.autoregressive.diffusion_decoder.architecture import architecture_of, config_from, is_architecture
from nemo_cosmos.autoregressive.diffusion_decoder.config import PRESETS, DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
from nemo_cosmos.autoregressive.diffusion_decoder.published import config_of_reference, is_reference
from nemo_cosmos.autoregressive.diffusion_decoder.state_dict import entering, leaving
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.checkpoints.family import Family, StoredModel, Target, cast
from nemo_cosmos.checkpoints.latents import with_latents
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.warm_start import copy_whole_weights
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.weight_files.stored_tensor import Weights

DIFFUSION_DECODER = Family(
    name="diffusion_decoder",
    presets=PRESETS,
    network=DiffusionDecoderDiT,
    is_architecture=is_architecture,
    architecture_of=architecture_of,
    config_from=config_from,
    is_reference=is_reference,
    config_of_reference=config_of_reference,
    entering=entering,
    leaving=leaving,
)


@dataclass(frozen=True, kw_only=True)
class StoredDiffusionDecoder:
    """A diffusion decoder that is not loaded yet."""

    model: StoredModel

    @property
    def card(self) -> CheckpointCard:
        """Of its weights."""
        return self.model.card

    def config(self, **layout: Any) -> DiffusionDecoderConfig:  # noqa: ANN401 - fields of DiTConfig
        """The architecture, with fields of how to run it.

        Raises:
            UserError: The card does not tell a whole architecture.
        """
        return config_from(self.card.config, **layout)

    def load(self, **layout: Any) -> DiffusionDecoderDiT:  # noqa: ANN401 - fields of DiTConfig
        """Builds and fills this rank's part, in evaluation mode, on the CPU; Megatron's process groups must be open."""
        weights = self.model.weights
        network = DiffusionDecoderDiT(self.config(**layout), **stage_ends(None)).eval().requires_grad_(False)
        read: Callable[[str], torch.Tensor] = lambda name: weights[name].read()  # noqa: E731
        copy_whole_weights(network, weights, read, source=self.card.model)
        return network


def find_diffusion_decoder(place: str | Path) -> StoredDiffusionDecoder:
    """Finds a diffusion decoder whose weights are exactly those of its architecture.

    Args:
        place: What `Family.open` takes, named as `find_checkpoint` takes it.

    Raises:
        UserError: It is something else, or a weight is missing, unknown, or of another shape; names it.
    """
    path = find_checkpoint(place)
    if not DIFFUSION_DECODER.lies_at(path, None):
        raise UserError(f"{place}: is no diffusion decoder. Give one that diffusion_decoder_tiny_finetune trained.")
    return StoredDiffusionDecoder(model=DIFFUSION_DECODER.open(path))


def convert_diffusion_decoder(
    source: Path,
    target: Path,
    *,
    to: str,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
) -> Weights:
    """Converts a diffusion decoder; arguments are those of `nemo_cosmos.checkpoints.convert.convert`.

    `tokenizer` is the continuous one, whose latents are drawn.

    Returns:
        What was written, under our names.

    Raises:
        UserError: The source is unknown or damaged, or the target cannot hold the model.
    """
    if to not in get_args(Target):
        raise user_error("--to", to, f"one of {get_args(Target)}", "Of diffusion decoders no others are written.")
    stored = DIFFUSION_DECODER.open(source, preset)
    card, weights = stored.card, cast(stored.weights, dtype)
    if (tokenizer, statistics) != (None, None):
        card = with_latents(card, tokenizer=tokenizer, statistics=statistics)
    DIFFUSION_DECODER.write(weights, card, target, to)
    return weights
