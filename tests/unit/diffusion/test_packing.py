"""Clips of different sizes in one sequence give what each gives alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_cosmos.diffusion import packing
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.packing import Pack, check_packed_layout
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.tokens import TokenShard
from tests.unit.diffusion.tiny_run import TEXT_DIM, tiny_dit

SHAPES = ((16, 2, 8, 8), (16, 1, 6, 4), (16, 3, 4, 8))
TOKENS = (32, 6, 24)
FPS = (24.0, 10.0, 30.0)


def clips() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "latent": torch.randn(1, *shape, generator=generator),
            "text_emb": torch.randn(1, 5, TEXT_DIM, generator=generator),
            "fps": torch.tensor([fps]),
            "draw_id": torch.tensor([number]),
        }
        for number, (shape, fps) in enumerate(zip(SHAPES, FPS, strict=True))
    ]


@pytest.fixture
def model(one_rank: torch.device) -> DiffusionModel:
    given = ConditioningConfig(min_condition_frames=1, max_condition_frames=1)
    model = DiffusionModel(tiny_dit(), conditioning=given)
    model.configure_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # many start at zero, which hides errors
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * values if values.ndim == 1 else 0.5 * values / values.shape[1] ** 0.5
    return model


def loss_and_gradients(model: DiffusionModel, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss, _ = model.training_loss_reduction.forward(batch, model.forward_step(batch))
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def test_loss_and_gradients_are_those_of_the_clips_one_by_one(model: DiffusionModel) -> None:
    got, gradients = loss_and_gradients(model, model.noised_pack(clips()))
    expected, sums = torch.zeros(()), [torch.zeros_like(p) for p in model.parameters()]
    for clip, tokens in zip(clips(), TOKENS, strict=True):
        share = tokens / sum(TOKENS)  # every latent value counts alike
        loss, own = loss_and_gradients(model, model.noised(clip))
        expected += share * loss
        for total, gradient in zip(sums, own, strict=True):
            total += share * gradient
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for (name, _), gradient, total in zip(model.named_parameters(), gradients, sums, strict=True):
        # float32 sums in another order, to the scale of the largest value.
        assert (gradient - total).abs().max() <= 5e-6 * total.abs().max(), name


def test_each_prediction_is_the_clips_own(model: DiffusionModel) -> None:
    pack = model.noised_pack(clips())
    together = model.forward_step(pack)["network_output"]
    for clip, got in zip(clips(), together, strict=True):
        alone = model.forward_step(model.noised(clip))["network_output"]
        assert got.shape == alone.shape
        torch.testing.assert_close(got, alone, rtol=0, atol=2e-6 * alone.abs().max().item())


def test_a_pack_of_one_clip_is_that_clip(model: DiffusionModel) -> None:
    first = clips()[0]
    packed, alone = (loss_and_gradients(model, b)[0] for b in (model.noised_pack([first]), model.noised(first)))
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_clips_without_a_rate_are_numbered_by_frames(model: DiffusionModel) -> None:
    """As pictures are, and as a batch is whose fps is None."""
    network = model.module
    latents, times, text = [torch.randn(1, *shape) for shape in SHAPES], torch.randn(3), torch.randn(3, 5, TEXT_DIM)
    together = network(latents, times, text)
    for number, latent in enumerate(latents):
        alone = network(latent, times[number : number + 1], text[number : number + 1])
        torch.testing.assert_close(together[number], alone, rtol=0, atol=2e-6 * alone.abs().max().item())


def test_pieces_cut_clips_where_ranks_begin() -> None:
    pack = Pack(grids=((2, 4, 4), (1, 3, 2), (3, 2, 4)))
    assert pack.lengths == TOKENS
    assert pack.pieces(TokenShard(0, 31, 62)) == [(0, TokenShard(0, 31, 32))]
    assert pack.pieces(TokenShard(31, 62, 62)) == [
        (0, TokenShard(31, 32, 32)),
        (1, TokenShard(0, 6, 6)),
        (2, TokenShard(0, 24, 24)),
    ]
    own, text = pack.attention_limits(TokenShard(31, 62, 62), 5, torch.device("cpu"))
    assert own.cu_seqlens_q.tolist() == own.cu_seqlens_kv.tolist() == [0, 32, 38, 62]
    assert (text.cu_seqlens_q.tolist(), text.cu_seqlens_kv.tolist()) == ([0, 1, 7, 31], [0, 5, 10, 15])
    assert (own.qkv_format, own.max_seqlen_q, text.max_seqlen_kv) == ("thd", 32, 5)


def test_packs_that_cannot_be_are_refused(one_rank: torch.device) -> None:
    network = CosmosDiT(tiny_dit())
    latents, times, text = [torch.randn(1, *shape) for shape in SHAPES], torch.randn(3), torch.randn(3, 5, TEXT_DIM)
    with pytest.raises(UserError, match=r"batch sizes in a pack: got \[2\], expected 1 for each"):
        network([torch.randn(2, *SHAPES[0])], times[:1], text[:1])
    with pytest.raises(UserError, match="entries for a pack: got {'timesteps_B': 2}, expected one for each of its 3"):
        network(latents, times[:2], text)
    with pytest.raises(UserError, match="padding mask and actions of a pack"):
        network(latents, times, text, padding_mask_B1HW=torch.zeros(3, 1, 8, 8))
    with pytest.raises(UserError, match="actions in packs"):
        DiffusionModel(tiny_dit(action_dim=7)).noised_pack(clips())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"context_parallel_size": 2, "cp_comm_type": "p2p"}, "got 2, .*cp_comm_type 'a2a': a ring knows no clips"),
        ({"context_parallel_size": 3}, "got 3, expected with packed clips a divisor of a rank's 4 heads"),
    ],
)
def test_context_parallel_ranks_that_cannot_share_heads_are_refused(layout: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_packed_layout(tiny_dit(**layout))


def test_transformer_engine_is_given_no_packs_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "get_backend", lambda name: SimpleNamespace(name="te"))
    with pytest.raises(UserError, match="1 with packed clips and TransformerEngine"):
        check_packed_layout(tiny_dit(context_parallel_size=2))
    check_packed_layout(tiny_dit(tensor_model_parallel_size=2))
