"""A conversion holds a few weights, never a checkpoint: shown on one of 306 MB whose largest weight has 8 MB."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.architecture import architecture_of
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.state_dict import leaving
from nemo_cosmos.files import write_json
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.weight_files.stored_tensor import StoredTensor, Weights
from nemo_cosmos.weight_files.torch_files import write_pt

CONFIG = {"num_layers": 8, "hidden_size": 1024, "num_attention_heads": 8, "extra_pos_embed": None, "backend": "torch"}


def drawn(config: DiTConfig) -> Weights:
    """Weights that are drawn when they are written, in bf16 as published."""
    with initialize(), torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CosmosDiT(config).global_tensors()}
    return {
        name: StoredTensor(shape=s, dtype=torch.bfloat16, read=lambda s=s: torch.rand(s, dtype=torch.bfloat16))
        for name, s in shapes.items()
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a reference file; it is emptied at the end, for it grows to gigabytes."""
    folder, config = tmp_path_factory.mktemp("large"), DiTConfig(**CONFIG)
    write_pt(folder / "model.pt", leaving(drawn(config), config, "reference"))
    card = CheckpointCard(model="test", config=architecture_of(config), step=0, data="none", command="test")
    write_json(folder / "model.json", card.to_dict())
    yield folder
    subprocess.run(["rm", "-r", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_a_checkpoint(checkpoints: Path) -> None:
    road = [("model.pt", "nemo", "nemo"), ("nemo", "diffusers", "diffusers"), ("diffusers", "back.pt", "reference")]
    size = (checkpoints / "model.pt").stat().st_size
    assert size > 250e6
    peaks = {}
    for source, target, to in road:
        command = [sys.executable, str(Path(__file__).with_name("conversion_memory.py"))]
        command += [str(checkpoints / source), str(checkpoints / target), to]
        peaks[to] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    # The largest shard that the formats have here is the whole file. What is measured is the 64 MB that is mapped of a
    # .pt at a time, or the few copies that joining three weights into one takes.
    assert max(peaks.values()) < 0.4 * size, peaks
