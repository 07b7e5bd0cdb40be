"""Samples that a run shows of its model do not depend on how the model is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.generation.sample_videos import SampleVideos
from nemo_cosmos.parallel import startup
from tests.distributed.dit_step import DIT
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_step import give_every_weight_a_value, named_parameters
from tests.distributed.same import assert_same
from tests.unit.diffusion.tiny_run import Latents, tiny_dit

pytestmark = pytest.mark.distributed


@torch.no_grad()
def sampled(num_stages: int) -> torch.Tensor:
    with startup.initialize(pipeline=num_stages):
        config = tiny_dit(pipeline_model_parallel_size=num_stages)
        model = DiffusionModel(config, conditioning=ConditioningConfig(max_condition_frames=1))
        model.configure_model()
        network = model.module.eval()
        give_every_weight_a_value(DIT, [network], {name: weight.shape for name, weight in named_parameters([network])})
        sampling = SampleVideos(every=1, tokenizer="tokenizer_tiny", num_steps=2, guidance=1.0)
        item = Latents()[0]
        return sampling._generate(item, item["latent"][None], model, network, seed=3)


def compare(rank: int, folder: Path, expected: torch.Tensor) -> None:
    # Two guided steps from sigma 80 magnify the rounding of one network call.
    assert_same(f"rank {rank}", sampled(2), expected, relative=2e-5)


def test_pipeline_stages_sample_what_one_rank_samples(tmp_path: Path) -> None:
    run_ranks(compare, 2, tmp_path, sampled(1))
