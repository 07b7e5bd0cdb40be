"""A training step of the tokenizer in every layout equals the step on one rank: loss, every gradient, every weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_cosmos.parallel import startup
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Sharing, split_rows
from nemo_cosmos.tokenizer.tensor_parallel import split_channels
from tests.distributed.launch import run_ranks
from tests.distributed.same import assert_same
from tests.distributed.tokenizer_step import (
    CONTINUOUS,
    DISCRETE,
    Layout,
    Step,
    loss_of,
    own_slice,
    step_by_megatron,
    step_by_torch,
)
from tests.unit.tokenizer.conftest import random_tokenizer

pytestmark = pytest.mark.distributed

TWO_RANKS = {
    "CP2 time": Layout(context=2, axis="time"),
    "CP2 height": Layout(context=2, axis="height"),
    "CP2 time, recomputed": Layout(context=2, axis="time", recompute=True),
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "DP2": Layout(data=2),
    "TP2 discrete": Layout(tensor=2, architecture=DISCRETE),
    "PP2 discrete": Layout(pipeline=2, architecture=DISCRETE),
}
FOUR_RANKS = {
    "CP4 time": Layout(context=4, axis="time"),
    "TP2 CP2 time": Layout(tensor=2, context=2, axis="time"),
    "TP2 CP2 height, recomputed": Layout(tensor=2, context=2, axis="height", recompute=True),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
    "PP2 CP2 time": Layout(pipeline=2, context=2, axis="time"),
    "CP2 height DP2, distributed optimizer": Layout(context=2, data=2, distributed_optimizer=True),
}
RELATIVE = 2e-5
"""Of a tensor's largest value. One rank's own fp32 gradients are off by up to 1.5e-5 from float64 here, and by 5e-4 in
the discrete tokenizer; most layouts differ by less than 3e-6 from it."""
FLOOR = 2e-7
"""Of gradients whose norm is 22 to 31: biases of keys, and before norms, have none but what rounding leaves of it."""
IMAGES = TokenizerConfig(
    modality="image",
    channels=32,
    channels_mult=(1, 2),
    num_res_blocks=1,
    latent_channels=4,
    patch_size=2,
    spatial_compression=4,
    temporal_compression=1,
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the weights that every rank starts from, by architecture."""
    folder = tmp_path_factory.mktemp("start")
    for architecture in (CONTINUOUS, DISCRETE):
        weights.save(random_tokenizer(architecture), folder / architecture.family)
    return folder


def check_layouts(rank: int, folder: Path, start: Path, layouts: dict[str, Layout]) -> None:
    references = {family: step_by_torch(start / family) for family in {x.architecture.family for x in layouts.values()}}
    for name, layout in layouts.items():
        family = layout.architecture.family
        with startup.initialize(**layout.groups, seed=7):
            assert startup.run_seed() == 7  # on every stage
            check_step(name, layout, step_by_megatron(layout, start / family), references[family])


def check_step(name: str, layout: Layout, step: Step, reference: Step) -> None:
    if parallel_state.is_pipeline_last_stage():
        own = reference.losses[parallel_state.get_data_parallel_rank() :: layout.data]
        assert step.losses == pytest.approx(own, rel=1e-6), name
    assert step.gradient_norm == pytest.approx(reference.gradient_norm, rel=RELATIVE), name
    pairs = [("weight", step.weights(), reference.weights())]
    if not layout.distributed_optimizer:  # there a rank holds sums of its own share only
        pairs.append(("gradient", step.gradients, reference.gradients))
    for kind, got, expected in pairs:
        for weight, value in got.items():
            whole = own_slice(step.model, weight, expected[weight])
            assert_same(f"{name}: {kind} of {weight}", value, whole, relative=RELATIVE, floor=FLOOR)
    networks = {weight.split(".")[0] for weight in step.gradients}
    if layout.pipeline == 1:
        assert step.gradients.keys() == reference.gradients.keys()
    elif parallel_state.is_pipeline_last_stage():
        assert networks == {"decoder", "post_quant_conv"}
    else:
        assert networks == {"encoder", "quant_conv"}


def check_images(rank: int, folder: Path) -> None:
    """Channels of two ranks times rows of two; Megatron has no part in it but the groups."""
    one, many = random_tokenizer(IMAGES), random_tokenizer(IMAGES)
    image = torch.rand(2, 3, 20, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with startup.initialize(tensor=2, context=2):
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        sharing = Sharing(config=IMAGES, axis="height", group=groups.cp)
        split_rows(many, groups.cp)
        split_channels(many, groups.tp)
        got, expected = sharing.join(many(sharing.own(image)), image.shape), one(image)
        assert_same("reconstruction", got, expected, relative=RELATIVE)
        for reconstruction in (got, expected):
            loss_of(reconstruction, image).backward()
        for (name, ours), theirs in zip(many.named_parameters(), one.parameters(), strict=True):
            torch.distributed.all_reduce(ours.grad, group=groups.cp)  # as DDP does
            assert_same(name, ours.grad, own_slice(many, name, theirs.grad), relative=RELATIVE, floor=FLOOR)


def test_a_step_of_two_ranks_equals_one(start: Path, tmp_path: Path) -> None:
    run_ranks(check_layouts, 2, tmp_path, start, TWO_RANKS)


def test_a_step_of_four_ranks_equals_one(start: Path, tmp_path: Path) -> None:
    run_ranks(check_layouts, 4, tmp_path, start, FOUR_RANKS)


def test_images_of_four_ranks_equal_one(tmp_path: Path) -> None:
    run_ranks(check_images, 4, tmp_path)
