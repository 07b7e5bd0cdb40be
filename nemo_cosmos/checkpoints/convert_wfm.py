"""Conversion of diffusion WFMs, weight by weight: no more than a few weights of a checkpoint are in memory at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_cosmos.checkpoints.family import StoredModel, cast
from nemo_cosmos.checkpoints.latents import told, with_latents
from nemo_cosmos.checkpoints.wfm import DIFFUSION, TRANSFORMER_CLASS, WEIGHTS_FILE, open_wfm
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion import state_dict as names
from nemo_cosmos.diffusion.architecture import config_from
from nemo_cosmos.diffusion.embeddings import UncertaintyHead
from nemo_cosmos.diffusion.initialization import initialize_weights
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.weight_files.safetensors_files import write_shards
from nemo_cosmos.weight_files.stored_tensor import Weights, stored

WfmTarget = Literal["nemo", "diffusers", "reference", "safetensors"]
"""Formats that a diffusion WFM may have."""

MAX_SHARD_SIZE = "5GB"
"""Of the files in a diffusers folder; what the Hugging Face hub advises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WfmConversion:
    """What a conversion did."""

    weights: Weights
    """As they were written, under our names."""
    dropped: tuple[str, ...]
    """What the target cannot hold: our names of weights, and fields of the card."""
    added: tuple[str, ...]
    """Weights that the source format cannot hold; the target got the first values of a training."""


def convert_wfm(
    source: Path,
    target: Path,
    *,
    to: str,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
) -> WfmConversion:
    """Converts a diffusion WFM; arguments are those of `nemo_cosmos.checkpoints.convert.convert`.

    Raises:
        UserError: The source is unknown or damaged, or the target cannot hold the model.
    """
    if to not in get_args(WfmTarget):
        raise user_error("--to", to, f"one of {get_args(WfmTarget)}", "Only tokenizers are written so.")
    wfm = open_wfm(source, preset)
    if (tokenizer, statistics) != (None, None):
        wfm = dataclasses.replace(wfm, card=with_latents(wfm.card, tokenizer=tokenizer, statistics=statistics))
    added = {} if to == "diffusers" else _lacking(wfm)
    weights = cast({**wfm.weights, **added}, dtype)
    dropped = _write(weights, wfm.card, target, to)
    return WfmConversion(weights=weights, dropped=dropped, added=tuple(added))


def _lacking(wfm: StoredModel) -> Weights:
    """First values of the weights that the source format cannot hold: the uncertainty head's."""
    if all(name in wfm.weights for name in wfm.may_lack):
        return {}
    config = config_from(wfm.card.config, backend="torch")
    head = UncertaintyHead(config)
    named = {f"logvar_head.{name}": tensor.detach() for name, tensor in head.state_dict().items()}
    assert named.keys() == set(wfm.may_lack), wfm.may_lack
    with initialize():
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp"])
        initialize_weights(named.items(), seed=config.init_seed, qk_norm=1.0, groups=groups, draw=True)
    return stored(named)


def _write(weights: Weights, card: CheckpointCard, target: Path, to: str) -> tuple[str, ...]:
    """Writes a WFM and returns what the format cannot hold."""
    if to == "diffusers":
        return _write_diffusers(weights, card, target)
    DIFFUSION.write(weights, card, target, to)
    return ()


def _write_diffusers(weights: Weights, card: CheckpointCard, folder: Path) -> tuple[str, ...]:
    config = config_from(card.config, backend="torch")
    renamed = names.leaving(weights, config, "diffusers")
    with written_aside(folder) as aside:
        aside.mkdir()
        write_shards(aside, WEIGHTS_FILE, renamed, max_shard_size=MAX_SHARD_SIZE)
        write_json(aside / "config.json", {"_class_name": TRANSFORMER_CLASS, **names.diffusers_config(config)})
    return (*names.NOT_IN_DIFFUSERS, *told(card))
