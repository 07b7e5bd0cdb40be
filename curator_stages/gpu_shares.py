"""What stages that run on a GPU ask an engine for."""

from __future__ import annotations

from dataclasses import replace

from nemo_curator.stages.resources import Resources

_NETWORK_SHARE = 0.25
"""Of a GPU, for a stage that runs a small network."""


def network_gpus(device: str) -> float:
    """Returns the share of a GPU for a stage that runs a network on this torch device."""
    return 0.0 if device == "cpu" else _NETWORK_SHARE


def with_gpus(resources: Resources, gpus: float) -> Resources:
    """Adds a stage's own need of GPUs to its resources, unless these tell of GPUs already."""
    return resources if resources.requires_gpu else replace(resources, gpus=gpus)
