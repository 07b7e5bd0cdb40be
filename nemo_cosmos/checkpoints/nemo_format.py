"""NeMo checkpoints from whole weights, and whole weights from NeMo checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.architecture import config_from
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.parallel.stored_weights import PREFIX, WEIGHTS, read_whole
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import build_tokenizer

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole weights under our names, averaged ones where the checkpoint has them.

    Raises:
        UserError: There is no whole checkpoint.
    """
    return read_whole(checkpoint)


def save(
    kind: Literal["tokenizer", "diffusion"],
    weights: dict[str, torch.Tensor],
    card: CheckpointCard,
    folder: Path,
    *,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Writes a Megatron distributed checkpoint in NeMo's layout, in float32 as training keeps weights, and its card.

    Args:
        kind: What the weights are.
        weights: Whole, under our names.
        card: Its `config` is the architecture.
        folder: Where; an older one is replaced.
        may_lack: Names that the source format cannot hold; such weights keep their first values.

    Raises:
        UserError: Any other weight is missing, or one is not of this architecture.
    """
    from megatron.core import dist_checkpointing

    with initialize():
        module = _network(card) if kind == "diffusion" else build_tokenizer(TokenizerConfig.from_dict(card.config))
        missing, unknown = module.load_state_dict(weights, strict=False)
        _refuse_gaps([name for name in missing if name not in may_lack and not name.endswith("_extra_state")], unknown)
        with written_aside(folder) as aside:
            (aside / WEIGHTS).mkdir(parents=True)
            dist_checkpointing.save({"state_dict": _sharded(module)}, str(aside / WEIGHTS))
            write_json(aside / "card.json", card.to_dict())


def _refuse_gaps(missing: list[str], unknown: list[str]) -> None:
    if missing or unknown:
        raise user_error(
            "weights",
            f"{len(missing)} missing {missing[:4]}, {len(unknown)} unknown {unknown[:4]}",
            "exactly those of the card's architecture",
            "Convert a whole checkpoint.",
        )


def _network(card: CheckpointCard) -> CosmosDiT:
    # TransformerEngine would want a GPU, and its layers store the same weights.
    return CosmosDiT(config_from(card.config, backend="torch"), **stage_ends(None))


def _sharded(module: nn.Module) -> ShardedStateDict:
    """What is saved of a module; every weight of a tokenizer is whole."""
    if isinstance(module, CosmosDiT):
        return module.sharded_state_dict(prefix=PREFIX)
    return make_sharded_tensors_for_checkpoint(module.state_dict(keep_vars=True), PREFIX)
