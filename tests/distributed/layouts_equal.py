"""Comparing a training step in many layouts with the step on one rank: loss, every gradient, every weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from nemo_cosmos.parallel import startup
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_step import Layout, Step, Trial, build, named_parameters, train_one_step

RELATIVE = 5e-6
"""Of a tensor's largest gradient: fp32 sums of some thousand terms in another order; 7e-7 was the most measured."""


def _assert_close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape, name
    scale = expected.abs().max().item()
    error = (got - expected).abs().max().item()
    assert error <= RELATIVE * scale + 1e-9, f"{name}: off by {error:.3g} where values reach {scale:.3g}"


def _compare_gradients(trial: Trial, where: str, layout: Layout, step: Step, expected: dict[str, torch.Tensor]) -> None:
    """The distributed optimizer keeps gradients of this rank's share only, which are compared; the others NaN."""
    kept = {name: ~gradient.isnan() for name, gradient in step.gradients}
    share = sum(mask.sum().item() for mask in kept.values()) / sum(mask.numel() for mask in kept.values())
    ranks = layout.data * layout.context if layout.distributed_optimizer else 1
    assert share == pytest.approx(1 / ranks, abs=0.1), where  # buffers are padded
    for name, gradient in step.gradients:
        whole = trial.own_slice(name, expected[name])
        _assert_close(f"{where}: gradient of {name}", gradient.where(kept[name], whole), whole)


def _compare_step(trial: Trial, where: str, layout: Layout, reference: dict) -> list[str]:
    """Returns the names of this rank's parameters."""
    with startup.initialize(**layout.groups):
        for name, parameter in named_parameters(build(trial, layout)):
            assert torch.equal(parameter, trial.own_slice(name, reference["first"][name])), f"{where}: first {name}"
        step = train_one_step(trial, layout, {name: weight.shape for name, weight in reference["first"].items()})
        if parallel_state.is_pipeline_last_stage():
            own = reference["losses"][parallel_state.get_data_parallel_rank() :: layout.data]
            assert step.losses == pytest.approx(own, rel=1e-6), where
        assert step.gradient_norm == pytest.approx(reference["gradient_norm"], rel=1e-5), where
        _compare_gradients(trial, where, layout, step, reference["gradients"])
        for name, weight in step.weights():
            _assert_close(f"{where}: weight {name}", weight, trial.own_slice(name, reference["weights"][name]))
        return [name for name, _ in named_parameters(step.chunks)]


def _compare_steps(rank: int, folder: Path, trial: Trial, layouts: dict[str, Layout], references: Path) -> None:
    names = {
        name: _compare_step(trial, name, layout, torch.load(references / f"{layout.task}.pt"))
        for name, layout in layouts.items()
    }
    (folder / f"names_{rank}.json").write_text(json.dumps(names))


def check_layouts(trial: Trial, layouts: dict[str, Layout], num_ranks: int, references: Path, folder: Path) -> None:
    """Takes a step in each layout of so many ranks and compares with one rank's.

    Args:
        trial: The model.
        layouts: By name.
        num_ranks: Of processes; layouts of others are left out.
        references: Where `reference_steps` left one rank's.
        folder: For the processes.
    """
    layouts = {name: layout for name, layout in layouts.items() if layout.num_ranks == num_ranks}
    run_ranks(_compare_steps, num_ranks, folder, trial, layouts, references)
    files = [json.loads(file.read_text()) for file in folder.glob("names_*.json")]
    for name, layout in layouts.items():
        held = [weight for file in files for weight in file[name]]
        assert set(held) == set(torch.load(references / f"{layout.task}.pt")["first"]), name
        copies = num_ranks // layout.pipeline
        shared = trial.num_shared(layout.task) if layout.pipeline > 1 else 0
        assert len(held) == copies * (len(set(held)) + shared), f"{name}: pipeline stages hold copies of a weight"
