"""Opening and converting an autoregressive WFM, weight by weight: few of them are in memory at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import torch

from nemo_cosmos.autoregressive.architecture import architecture_of, config_from, is_architecture
from nemo_cosmos.autoregressive.config import PRESETS
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.published import config_of_reference, is_reference
from nemo_cosmos.autoregressive.shards import merge_shards, shard_files
from nemo_cosmos.autoregressive.state_dict import entering, leaving
from nemo_cosmos.checkpoints.family import Family, Target, cast
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.checkpoints.weight_file import open_file
from nemo_cosmos.errors import user_error
from nemo_cosmos.weight_files.stored_tensor import Weights


def _open_shards(file: Path) -> Weights:
    """Where tensor-parallel ranks share the weights there is a file for each (`..._mp_0.pt` and so on); name any."""
    return merge_shards([open_file(shard) for shard in shard_files(file)])


AUTOREGRESSIVE = Family(
    name="autoregressive",
    presets=PRESETS,
    network=CosmosAR,
    is_architecture=is_architecture,
    architecture_of=architecture_of,
    config_from=config_from,
    is_reference=is_reference,
    config_of_reference=config_of_reference,
    entering=entering,
    leaving=leaving,
    open_file=_open_shards,
)


def convert_autoregressive(
    source: Path,
    target: Path,
    *,
    to: str,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> Weights:
    """Converts an autoregressive WFM; arguments are those of `nemo_cosmos.checkpoints.convert.convert`.

    Returns:
        What was written, under our names.

    Raises:
        UserError: The source is unknown or damaged, or the target cannot hold the model.
    """
    if to not in get_args(Target):
        raise user_error("--to", to, f"one of {get_args(Target)}", "Of autoregressive WFMs no others are written.")
    stored = AUTOREGRESSIVE.open(source, preset)
    card, weights = stored.card, cast(stored.weights, dtype)
    if tokenizer is not None:
        card = dataclasses.replace(card, tokenizer_fingerprint=load_tokenizer(tokenizer).model.fingerprint())
    if to == "reference":
        card = dataclasses.replace(card, config={**card.config, "num_medusa_heads": 0})  # that format has none
    AUTOREGRESSIVE.write(weights, card, target, to)
    return weights
