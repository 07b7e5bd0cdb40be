from __future__ import annotations

import torch

from nemo_cosmos.diffusion.positions import sincos_positions
from nemo_cosmos.diffusion.rope import rope_tables
from nemo_cosmos.transformer.rotary import apply_rope


def test_tables_of_a_generation_serve_training() -> None:
    grid = (2, 3, 5)
    rope_tables.cache_clear()
    with torch.inference_mode():
        tables = rope_tables(grid, 18, (1.0, 1.0, 1.0), (1.0,), (0, 30), torch.device("cpu"))
    x_sBNH = torch.randn(30, 1, 2, 18, requires_grad=True)
    apply_rope(x_sBNH, tables).square().sum().backward()
    torch.testing.assert_close(x_sBNH.grad, 2 * x_sBNH.detach())  # a rotation keeps the length


@torch.no_grad()
def test_few_tables_are_kept() -> None:
    for width in range(3, 12):
        rope_tables((1, 2, width), 18, (1.0, 1.0, 1.0), (1.0,), (0, 2 * width), torch.device("cpu"))
        sincos_positions((1, 2, width), 18, (0, 2 * width), torch.float32, torch.device("cpu"))
    assert rope_tables.cache_info().currsize <= 4
    assert sincos_positions.cache_info().currsize <= 2
