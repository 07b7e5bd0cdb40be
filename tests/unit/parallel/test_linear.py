"""Megatron's linear layers give the same by oneDNN, and take it for plain products of many float32 rows alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from nemo_cosmos.parallel import linear as module
from nemo_cosmos.parallel import startup
from tests.unit.parallel.test_backend import config_for

ROWS, WIDTH, OUT = 320, 48, 40


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with startup.initialize():
        yield


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Inputs of the products that oneDNN made."""
    made, product = [], module.onednn_linear

    def spy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        made.append(x)
        return product(x, weight)

    monkeypatch.setattr(module, "onednn_linear", spy)
    return made


def _layer(kind: type[torch.nn.Module], dtype: torch.dtype = torch.float32, **overrides: bool) -> torch.nn.Module:
    own = {"input_is_parallel": True, "skip_bias_add": False} if issubclass(kind, RowParallelLinear) else {}
    arguments = {"bias": False, **own, **overrides}
    torch.manual_seed(0)
    config = config_for(params_dtype=dtype, perform_initialization=False)
    layer = kind(WIDTH, OUT, config=config, init_method=torch.nn.init.normal_, **arguments)
    torch.nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize(
    ("kind", "megatrons"), [(module.ColumnLinear, ColumnParallelLinear), (module.RowLinear, RowParallelLinear)]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_megatrons_layer(
    products: list[torch.Tensor], kind: type[torch.nn.Module], megatrons: type[torch.nn.Module], frozen: bool
) -> None:
    x, grad = torch.randn(ROWS // 2, 2, WIDTH, requires_grad=True), torch.randn(ROWS // 2, 2, OUT)
    results = []
    for layer in (_layer(kind), _layer(megatrons)):
        layer.weight.requires_grad_(not frozen)
        out = layer(x)[0]
        leaves = (x,) if frozen else (x, layer.weight)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert [tuple(product.shape) for product in products] == [tuple(x.shape), tuple(grad.shape)]
    # Sums of up to 320 products of order one in another order.
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)


def test_other_cases_stay_with_megatron(products: list[torch.Tensor]) -> None:
    many, few = torch.randn(ROWS, 1, WIDTH), torch.randn(8, 1, WIDTH)
    _layer(module.ColumnLinear)(few)
    _layer(module.ColumnLinear, torch.bfloat16)(many.bfloat16())
    _layer(module.ColumnLinear, bias=True)(many)
    assert not products
    weight = torch.randn(OUT, WIDTH)
    plain = {"bias": None, "allreduce_dgrad": False, "sequence_parallel": False}
    assert module._suits(many, weight, **plain)
    for exchanged in ("allreduce_dgrad", "sequence_parallel"):
        assert not module._suits(many, weight, **plain | {exchanged: True})
