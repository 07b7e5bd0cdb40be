"""A training step of the DiT in every layout equals the step on one rank: loss, every gradient, every weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from nemo_cosmos.parallel import startup
from tests.distributed.dit_step import (
    Layout,
    build,
    named_parameters,
    own_slice,
    reference_step,
    train_one_step,
)
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

RELATIVE = 5e-6
"""Of a tensor's largest gradient: fp32 sums of some thousand terms in another order; 7e-7 was the most measured."""

LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2 SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "PP2 interleaved": Layout(pipeline=2, virtual=2),
    "CP2": Layout(context=2),
    "CP2 all-gather": Layout(context=2, overrides={"cp_comm_type": "all_gather"}),
    "DP2": Layout(data=2),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
    "TP2 SP CP2": Layout(tensor=2, context=2, sequence_parallel=True),
    "TP2 DP2 distributed optimizer": Layout(tensor=2, data=2, distributed_optimizer=True),
}


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    error = (got - expected).abs().max().item()
    assert error <= RELATIVE * scale + 1e-9, f"{name}: off by {error:.3g} where values reach {scale:.3g}"


def compare_step(rank: int, folder: Path, layout: Layout, reference_file: Path) -> None:
    reference = torch.load(reference_file)
    with startup.initialize(**layout.groups):
        for name, parameter in named_parameters(build(layout)):
            assert torch.equal(parameter, own_slice(name, reference["first"][name])), f"first value of {name}"
        step = train_one_step(layout, {name: w.shape for name, w in reference["first"].items()})
        if parallel_state.is_pipeline_last_stage():
            own = reference["losses"][parallel_state.get_data_parallel_rank() :: layout.data]
            assert step.losses == pytest.approx(own, rel=1e-6)
        assert step.gradient_norm == pytest.approx(reference["gradient_norm"], rel=1e-5)
        if not layout.distributed_optimizer:  # there a rank holds sums of its own share only
            for name, gradient in step.gradients:
                assert_close(f"gradient of {name}", gradient, own_slice(name, reference["gradients"][name]))
        for name, weight in named_parameters(step.chunks):
            assert_close(f"weight {name}", weight.detach(), own_slice(name, reference["weights"][name]))
        (folder / f"names_{rank}.json").write_text(json.dumps([name for name, _ in named_parameters(step.chunks)]))


SHALLOW = {"num_layers": 2}
"""So few layers that the gradient buffers of the two stages are of unlike sizes."""

SHALLOW_LAYOUTS = {
    "PP2 DP2 distributed optimizer": Layout(pipeline=2, data=2, distributed_optimizer=True, overrides=SHALLOW),
    "PP2 CP2 distributed optimizer": Layout(pipeline=2, context=2, distributed_optimizer=True, overrides=SHALLOW),
}


@pytest.fixture(scope="module")
def shallow_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `one_rank_step`, of a model with fewer layers."""
    folder = tmp_path_factory.mktemp("shallow")
    run_ranks(reference_step, 1, folder, SHALLOW)
    return folder / "reference.pt"


@pytest.mark.parametrize("name", SHALLOW_LAYOUTS)
def test_step_of_few_layers_equals_one_rank(name: str, shallow_step: Path, tmp_path: Path) -> None:
    layout = SHALLOW_LAYOUTS[name]
    run_ranks(compare_step, layout.num_ranks, tmp_path, layout, shallow_step)


@pytest.mark.parametrize("name", LAYOUTS)
def test_step_equals_one_rank(name: str, one_rank_step: Path, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    run_ranks(compare_step, layout.num_ranks, tmp_path, layout, one_rank_step)
    seen = {name for file in tmp_path.glob("names_*.json") for name in json.loads(file.read_text())}
    assert seen == set(torch.load(one_rank_step)["first"])
