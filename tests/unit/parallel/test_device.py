"""What a device reaches."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.parallel.device import matmul_flops_per_s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_on_drawn_numbers_that_no_run_notices(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: factors.append(a) or mm(a, b, out=out))
    before = torch.get_rng_state()
    assert matmul_flops_per_s(dtype) > 1e6
    assert torch.equal(torch.get_rng_state(), before)
    assert factors[0].dtype == dtype and factors[0].float().std() > 0.9
