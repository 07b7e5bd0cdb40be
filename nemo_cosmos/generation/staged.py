"""A network that is cut into pipeline stages, called as if it were whole."""

from __future__ import annotations

from typing import Any

import torch

from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.parallel.stages import run_stages


class StagedNetwork:
    """Runs the stages one after the other; every rank gives the same input and gets the whole output.

    Args:
        network: This rank's stage, without an interleaved schedule.
    """

    def __init__(self, network: CosmosDiT) -> None:
        self._network = network

    def __call__(self, x_BCTHW: torch.Tensor, *conditions: torch.Tensor, **more: Any) -> torch.Tensor:  # noqa: ANN401 - those of CosmosDiT.forward
        """Predicts; see `CosmosDiT.forward`."""
        network = self._network

        def stage(hidden: torch.Tensor | None) -> torch.Tensor:
            if hidden is not None:
                network.set_input_tensor(hidden)
            return network(x_BCTHW, *conditions, **more)

        return run_stages(
            stage,
            network.groups.pp,
            output_shape=(len(x_BCTHW), network.config.out_channels, *x_BCTHW.shape[2:]),
            dtype=next(network.parameters()).dtype,
            device=x_BCTHW.device,
        )
