"""Starting a run from whole weights, in any parallel layout."""

from __future__ import annotations

from pathlib import Path

from nemo_cosmos.autoregressive.initialization import own_weight
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.transformer import weights


def load_whole_weights(model: CosmosAR, path: str | Path, *, may_lack: tuple[str, ...] = ()) -> None:
    """Copies this rank's share of a safetensors file of whole weights, one weight at a time.

    Args:
        model: This rank's part of the network.
        path: Weights under our names, as one rank holds them; or their address on the hub.
        may_lack: Prefixes of names that may be absent; such weights keep their values.

    Raises:
        UserError: The file is missing, or a weight is missing or of another shape.
    """
    weights.load_whole_weights(
        model.global_tensors(), path, lambda name, whole: own_weight(name, whole, model.groups.tp), may_lack=may_lack
    )
