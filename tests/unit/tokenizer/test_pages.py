from __future__ import annotations

from pathlib import Path

import torch

from nemo_cosmos.tokenizer import pages


def resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_pages_go_back_with_the_last_view() -> None:
    like = torch.zeros(1)
    before = resident_bytes()
    tensor = pages.empty(like, 64, 256, 1024)
    assert tensor.shape == (64, 256, 1024) and tensor.dtype == torch.float32
    view = tensor.fill_(1.0)[1:]
    del tensor
    assert resident_bytes() - before >= 60 * 2**20
    assert view.sum() == 63 * 256 * 1024
    del view
    assert resident_bytes() - before <= 8 * 2**20


def test_small_tensors_are_the_allocators() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    tensor = pages.empty(like, 3, 5)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.bfloat16
    assert tensor.resize_(10).shape == (10,)  # which memory of others would refuse
