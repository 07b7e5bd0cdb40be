"""A training step of the DiT in every layout equals the step on one rank: loss, every gradient, every weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from nemo_cosmos.parallel import startup
from tests.distributed.dit_step import Layout, Step, build, named_parameters, own_slice, train_one_step
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.distributed

RELATIVE = 5e-6
"""Of a tensor's largest gradient: fp32 sums of some thousand terms in another order; 7e-7 was the most measured."""

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
RING, GATHER = {"cp_comm_type": "p2p"}, {"cp_comm_type": "all_gather"}

LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP2 SP": Layout(tensor=2, sequence_parallel=True),
    "TP2 SP full recompute": Layout(tensor=2, sequence_parallel=True, overrides=FULL),
    "PP2": Layout(pipeline=2),
    "PP2 interleaved": Layout(pipeline=2, virtual=2),
    "PP2 fixed positions": Layout(pipeline=2, task="no actions, fixed positions"),
    "PP2 distributed optimizer": Layout(pipeline=2, distributed_optimizer=True),
    "CP2": Layout(context=2),
    "CP2 ring": Layout(context=2, overrides=RING),
    "CP2 ring selective recompute": Layout(context=2, overrides={**RING, **SELECTIVE}),
    "CP2 all-gather": Layout(context=2, overrides=GATHER),
    "CP2 images": Layout(context=2, task="images"),
    "CP2 three images": Layout(context=2, task="three images"),
    "CP2 images recompute": Layout(context=2, task="images", overrides=FULL),
    "DP2": Layout(data=2),
    "DP2 distributed optimizer": Layout(data=2, distributed_optimizer=True),
    "DP2 FSDP": Layout(data=2, fsdp=True),
    "DP2 FSDP full recompute": Layout(data=2, fsdp=True, overrides=FULL),
    "CP2 FSDP": Layout(context=2, fsdp=True),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
    "TP2 SP PP2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "TP2 SP CP2": Layout(tensor=2, context=2, sequence_parallel=True),
    "TP2 SP CP2 ring": Layout(tensor=2, context=2, sequence_parallel=True, overrides=RING),
    "TP2 SP CP2 images": Layout(tensor=2, context=2, sequence_parallel=True, task="images"),
    "CP4 ring": Layout(context=4, overrides=RING),
    "CP4 all-to-all": Layout(context=4, overrides={"cp_comm_type": "a2a"}),
    "PP2 CP2 images": Layout(pipeline=2, context=2, task="images"),
    "TP2 DP2 distributed optimizer": Layout(tensor=2, data=2, distributed_optimizer=True),
    "PP2 DP2 distributed optimizer": Layout(pipeline=2, data=2, distributed_optimizer=True, task="few layers"),
    "PP2 CP2 distributed optimizer": Layout(pipeline=2, context=2, distributed_optimizer=True, task="few layers"),
    "TP2 SP DP2 FSDP": Layout(tensor=2, data=2, sequence_parallel=True, fsdp=True),
}


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape, name
    scale = expected.abs().max().item()
    error = (got - expected).abs().max().item()
    assert error <= RELATIVE * scale + 1e-9, f"{name}: off by {error:.3g} where values reach {scale:.3g}"


def compare_gradients(where: str, layout: Layout, step: Step, expected: dict[str, torch.Tensor]) -> None:
    """The distributed optimizer keeps gradients of this rank's share only, which are compared; the others NaN."""
    kept = {name: ~gradient.isnan() for name, gradient in step.gradients}
    share = sum(mask.sum().item() for mask in kept.values()) / sum(mask.numel() for mask in kept.values())
    ranks = layout.data * layout.context if layout.distributed_optimizer else 1
    assert share == pytest.approx(1 / ranks, abs=0.1), where  # buffers are padded
    for name, gradient in step.gradients:
        whole = own_slice(name, expected[name])
        assert_close(f"{where}: gradient of {name}", gradient.where(kept[name], whole), whole)


def compare_step(where: str, layout: Layout, reference: dict) -> list[str]:
    """Returns the names of this rank's parameters."""
    with startup.initialize(**layout.groups):
        for name, parameter in named_parameters(build(layout)):
            assert torch.equal(parameter, own_slice(name, reference["first"][name])), f"{where}: first {name}"
        step = train_one_step(layout, {name: weight.shape for name, weight in reference["first"].items()})
        if parallel_state.is_pipeline_last_stage():
            own = reference["losses"][parallel_state.get_data_parallel_rank() :: layout.data]
            assert step.losses == pytest.approx(own, rel=1e-6), where
        assert step.gradient_norm == pytest.approx(reference["gradient_norm"], rel=1e-5), where
        compare_gradients(where, layout, step, reference["gradients"])
        for name, weight in step.weights():
            assert_close(f"{where}: weight {name}", weight, own_slice(name, reference["weights"][name]))
        return [name for name, _ in named_parameters(step.chunks)]


def compare_steps(rank: int, folder: Path, layouts: dict[str, Layout], references: Path) -> None:
    names = {
        name: compare_step(name, layout, torch.load(references / f"{layout.task}.pt"))
        for name, layout in layouts.items()
    }
    (folder / f"names_{rank}.json").write_text(json.dumps(names))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_steps_equal_one_rank(num_ranks: int, one_rank_steps: Path, tmp_path: Path) -> None:
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout.num_ranks == num_ranks}
    run_ranks(compare_steps, num_ranks, tmp_path, layouts, one_rank_steps)
    files = [json.loads(file.read_text()) for file in tmp_path.glob("names_*.json")]
    for name, layout in layouts.items():
        held = [weight for file in files for weight in file[name]]
        assert set(held) == set(torch.load(one_rank_steps / f"{layout.task}.pt")["first"]), name
        copies = num_ranks // layout.pipeline
        assert len(held) == copies * len(set(held)), f"{name}: pipeline stages hold copies of a weight"
