"""What runs on CPUs gives the same numbers on a GPU: models, gradients, decoding, tokenizer, training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_cosmos.autoregressive.decode import UNKNOWN, write_tokens
from nemo_cosmos.autoregressive.token_sampling import GREEDY, TokenSampling
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.attention import SDPACoreAttention
from nemo_cosmos.tokenizer.weights import load_default
from tests.unit.autoregressive import test_model as autoregressive
from tests.unit.diffusion import test_model as diffusion

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-5
"""Of the largest value: both devices add up float32 products, in another order."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Groups of one rank over nccl, and convolutions in full float32 as those of CPUs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with startup.initialize() as device:
        assert device.type == "cuda"
        yield device


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error, scale = (got.cpu() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * scale, f"{name}: off by {error:.3g} where values reach {scale:.3g}"


def assert_same_gradients(on_gpu: torch.nn.Module, on_cpu: torch.nn.Module) -> None:
    for (name, mine), other in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        if other.grad is not None:
            assert_close(name, mine.grad, other.grad, 5 * TOLERANCE)  # sums over all tokens


@pytest.mark.parametrize("positions", ["learnable", None])
def test_dit(positions: str | None, gpu: torch.device) -> None:
    models = [diffusion.model_for(extra_pos_embed=positions) for _ in range(2)]
    models[0].to(gpu)
    outputs = []
    for model, device in zip(models, (gpu, torch.device("cpu")), strict=True):
        inputs = {name: x.to(device) for name, x in diffusion.inputs().items()}
        outputs.append(model(**inputs, fps=24.0))
        outputs[-1].square().sum().backward()
    assert_close("output", outputs[0], outputs[1])
    assert_same_gradients(*models)


@pytest.mark.parametrize("case", ["12B", "13B"])
def test_autoregressive_model(case: str, gpu: torch.device) -> None:
    config = autoregressive.config_for(**autoregressive.CASES[case])
    models = [autoregressive.model_for(config) for _ in range(2)]
    models[0].to(gpu)
    tokens, text = autoregressive.inputs_for(config)
    on_gpu = models[0](tokens.to(gpu), autoregressive.GRID, None if text is None else text.to(gpu))
    on_cpu = models[1](tokens, autoregressive.GRID, text)
    assert_close("logits", on_gpu, on_cpu)
    for logits in (on_gpu, on_cpu):
        logits.square().sum().backward()
    assert_same_gradients(*models)


@pytest.mark.parametrize("compile_steps", [False, True])
def test_decoding(compile_steps: bool, gpu: torch.device) -> None:
    """Every token is that of the CPU; compiled steps replay CUDA graphs, of which none is given up."""
    config = autoregressive.config_for(**autoregressive.CASES["13B"], kv_channels=32, hidden_size=128)
    model = autoregressive.model_for(config)
    tokens, text = autoregressive.inputs_for(config)
    tokens = tokens[:, :25]  # without padding
    tokens[:, 9:] = UNKNOWN

    def written(device: torch.device, sampling: TokenSampling, *, compile_steps: bool = False) -> torch.Tensor:
        result = write_tokens(
            model.to(device),
            tokens.clone().to(device),
            autoregressive.GRID,
            text.to(device),
            sampling=sampling,
            seeds=[3, 4],
            compile=compile_steps,
        )
        return result.tokens_BS.cpu()

    counters = torch._dynamo.utils.counters
    for sampling in (GREEDY, TokenSampling()):
        torch._dynamo.reset()
        counters.clear()
        expected = written(torch.device("cpu"), sampling)
        assert torch.equal(written(gpu, sampling, compile_steps=compile_steps), expected)
        assert (counters["stats"]["unique_graphs"] > 0) is compile_steps
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bf16(causal: bool, gpu: torch.device) -> None:
    """The kernel for this device against a float64 product, forward and backward."""
    from megatron.core.transformer.enums import AttnMaskType

    config = autoregressive.config_for()
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention = SDPACoreAttention(config, 1, mask, "self", softmax_scale=128**-0.5).to(gpu)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(320, 2, 4, 128, generator=generator).bfloat16().to(gpu).requires_grad_() for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as calls:
        got = attention(*inputs)
    if torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        assert "aten::_scaled_dot_product_cudnn_attention" in {event.key for event in calls.key_averages()}
    exact = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = (x.permute(1, 2, 0, 3) for x in exact)
    scores = query @ key.transpose(-1, -2) * 128**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(320, 320, dtype=torch.bool, device=gpu).triu(1), -torch.inf)
    expected = (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)
    direction = torch.randn(expected.shape, generator=generator).to(gpu)
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close("output", got.double(), expected.detach().cpu(), 0.01)  # bf16 has 8 bits
    for name, mine, other in zip("qkv", inputs, exact, strict=True):
        assert_close(name, mine.grad.double(), other.grad.cpu(), 0.02)


def test_embedded_tokenizer(gpu: torch.device) -> None:
    tokenizer = load_default()
    video = torch.rand(1, 3, 17, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        latent = tokenizer.encode(video)
        shown = tokenizer.decode(latent)
        tokenizer.to(gpu)
        assert_close("latent", tokenizer.encode(video.to(gpu)), latent, 1e-4)
        assert_close("video", tokenizer.decode(latent.to(gpu)), shown, 1e-4)


def test_a_run_that_lost_its_last_steps_makes_them_again(tmp_path: Path) -> None:
    """With PyTorch's Adam where TransformerEngine is missing, and its states out of a checkpoint."""
    from tests.unit.training.tiny_run import run

    losses = run(tmp_path / "run", steps=6, precision="bf16-mixed")
    startup.shutdown()
    shutil.copytree(tmp_path / "run", tmp_path / "resumed", symlinks=True)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step=0000006")
    (tmp_path / "resumed" / "checkpoints" / "step=0000006-last").unlink()
    again = run(tmp_path / "resumed", steps=6, precision="bf16-mixed")
    startup.shutdown()
    assert again == {5: losses[5], 6: losses[6]}
    assert losses[6] < losses[1]
