import torch
from torch.nn import functional

from nemo_cosmos.parallel.activation import gelu


def test_values_and_gradients_are_torchs_and_inputs_are_overwritten_without_gradient() -> None:
    x = torch.linspace(-4, 4, 9, requires_grad=True)
    before = x.detach().clone()
    y = gelu(x)
    torch.testing.assert_close(y, functional.gelu(before), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(functional.gelu(x).sum(), x)[0], rtol=0, atol=0)
    assert torch.equal(x, before)
    overwritten = before.clone()
    assert gelu(overwritten) is overwritten and torch.equal(overwritten, y)
