"""Ranks of a node load one text encoder among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_cosmos.text import encoder, load_text_encoder
from nemo_cosmos.text.cache import FOLDER_VARIABLE
from tests.distributed.launch import run_ranks
from tests.unit.text.tiny_t5 import write_tiny_t5

pytestmark = pytest.mark.distributed

PROMPTS = ["a car turns left", "a robot arm opens the drawer"]


def encode(rank: int, folder: Path) -> None:
    """All ranks ask for the same prompts at the same time."""
    load = encoder._load

    def note_and_load(*args: object) -> encoder.TextEncoder:
        (folder / f"loaded_by_{rank}").touch()
        return load(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder / "cache"))
        patch.setattr(encoder, "_load", note_and_load)
        torch.distributed.barrier()
        states, mask = load_text_encoder(folder / "t5").encode(PROMPTS)
    torch.save((states, mask), folder / f"states_{rank}.pt")


def test_one_of_two_ranks_loads_the_model_and_both_have_its_states(tmp_path: Path) -> None:
    write_tiny_t5(tmp_path / "t5")
    run_ranks(encode, 2, tmp_path)
    (states, mask), (others, other_mask) = (torch.load(tmp_path / f"states_{rank}.pt") for rank in range(2))
    assert torch.equal(states, others)
    assert torch.equal(mask, other_mask)
    assert states[mask].abs().sum(-1).min() > 0
    assert len(list(tmp_path.glob("loaded_by_*"))) == 1
