"""The diffusion decoder's network, its warm start, its training step, and how it samples long videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_cosmos.autoregressive.diffusion_decoder.config import (
    DiffusionDecoderConfig,
    diffusion_decoder_7b,
    diffusion_decoder_tiny,
)
from nemo_cosmos.autoregressive.diffusion_decoder.denoiser import TokenDenoiser
from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT, first_embedding
from nemo_cosmos.autoregressive.diffusion_decoder.step import DiffusionDecoderModel
from nemo_cosmos.autoregressive.diffusion_decoder.windows import blend_windows, reflected, window_starts
from nemo_cosmos.checkpoints import nemo_format
from nemo_cosmos.contracts import CheckpointCard, LatentCacheCard
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.config import diffusion_tiny
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.parallel.stored_weights import PREFIX
from nemo_cosmos.weight_files.stored_tensor import stored

SMALL = {"num_layers": 2, "token_vocab_size": 16, "init_token_levels": None}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with initialize():
        yield


def decoder(**overrides: object) -> DiffusionDecoderDiT:
    """All weights at random, so that everything has an effect."""
    network = DiffusionDecoderDiT(diffusion_decoder_tiny(**{**SMALL, **overrides})).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return network


def inputs(frames: int = 3, size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 16, frames, size, size, generator=generator)
    return latent, torch.tensor([0.1, -0.4]), torch.randn(2, 5, 384, generator=generator)


def tokens(frames: int = 3, size: int = 4) -> torch.Tensor:
    return torch.randint(16, (2, frames, size, size), generator=torch.Generator().manual_seed(3), dtype=torch.int32)


def test_the_published_size_has_its_number_of_parameters() -> None:
    """The 7B without learnable positions, 32 channels more in each patch, and the embedding of 64,000 codes."""
    with torch.device("meta"):
        network = DiffusionDecoderDiT(diffusion_decoder_7b(backend="torch"))
    head = sum(p.numel() for p in network.logvar_head.parameters())
    assert sum(p.numel() for p in network.parameters()) - head == 7_237_257_216
    assert network.x_embedder.proj.weight.shape == (4096, 4 * (16 + 32 + 1))
    assert network.config.rope_ratio == (1.0, 1.5, 1.5)


def test_what_cannot_be_is_refused() -> None:
    for field, value in (("token_vocab_size", 1), ("init_token_levels", (8, 8)), ("action_dim", 7)):
        with pytest.raises(UserError, match=field):
            diffusion_decoder_tiny(**{field: value})
    with pytest.raises(UserError, match=r"tokens: got \(2, 3, 2, 2\), expected \(2, 3, 4, 4\)"):
        decoder()(*inputs(), tokens_BTHW=tokens(size=2))


def test_tokens_of_a_coarser_grid_are_embedded_as_torch_resizes() -> None:
    """What torchvision's bilinear resizing, which the published network uses, does when a picture grows."""
    network, coarse = decoder(token_upsampling=2), tokens(size=2)
    seen = []
    network.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(*inputs(), tokens_BTHW=coarse)
    embedded = network.token_embedder.weight[coarse.long()].permute(0, 4, 1, 2, 3)
    expected = torch.nn.functional.interpolate(
        embedded, size=(3, 4, 4), mode="trilinear"
    )  # of as many frames: bilinear in each
    patches = seen[0].view(3, 2, 2, 2, 49, 2, 2)  # T H W B C h w
    got = patches[..., 16:48, :, :].permute(3, 4, 0, 1, 5, 2, 6).reshape(2, 32, 3, 4, 4)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)  # interpolated in another order


def test_codes_that_are_near_each_other_begin_with_embeddings_near_each_other() -> None:
    table = first_embedding(diffusion_decoder_tiny())
    assert table.shape == (4096, 32)
    assert table.square().mean().sqrt().item() == pytest.approx(0.3 * (28 / 32) ** 0.5, rel=1e-4)  # cos(8 pi u) is 0
    gram = table.T @ table / len(table)
    torch.testing.assert_close(gram[:28, :28], 0.09 * torch.eye(28), atol=1e-5, rtol=0)
    base = 3 + 3 * 8 + 3 * 64 + 3 * 512
    near, far = base + 8, base + 4 * 8
    assert (table[near] - table[base]).norm() < (table[far] - table[base]).norm()
    assert not first_embedding(DiffusionDecoderConfig(num_layers=1, hidden_size=72, num_attention_heads=4)).any()


@pytest.fixture(scope="module")
def wfm(tmp_path_factory: pytest.TempPathFactory) -> tuple[CosmosDiT, Path, Path]:
    """A WFM, its safetensors file and a NeMo checkpoint of it."""
    folder = tmp_path_factory.mktemp("wfm")
    model = CosmosDiT(diffusion_tiny(num_layers=2)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    state = {name: tensor.clone() for name, tensor in model.global_tensors()}
    save_file(state, folder / "wfm.safetensors")
    card = CheckpointCard(model="test", config={}, step=0, data="none", command="none")
    nemo_format.save(stored(state), card, folder / "nemo", describe=lambda: model.sharded_state_dict(prefix=PREFIX))
    return model, folder / "wfm.safetensors", folder / "nemo"


@pytest.mark.parametrize("kind", [1, 2])
def test_a_decoder_starts_as_the_wfm_whatever_the_tokens(wfm: tuple[CosmosDiT, Path, Path], kind: int) -> None:
    model = DiffusionDecoderModel(diffusion_decoder_tiny(**SMALL), init_from=str(wfm[kind]))
    model.configure_model()
    with torch.no_grad():
        expected = wfm[0](*inputs(), fps=10.0)
        output = model.module(*inputs(), fps=10.0, tokens_BTHW=tokens())
    # The same sums with zeros between.
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    columns = model.module.x_embedder.proj.weight[:, 64:-4]
    assert columns.shape[1] == 128 and columns.abs().min() > 0, "else the tokens' embedding would never move"


def test_a_decoder_goes_on_from_another(tmp_path: Path) -> None:
    former = decoder()
    save_file({name: tensor.clone() for name, tensor in former.global_tensors()}, tmp_path / "decoder.safetensors")
    model = DiffusionDecoderModel(diffusion_decoder_tiny(**SMALL), init_from=str(tmp_path / "decoder.safetensors"))
    model.configure_model()
    own = dict(model.module.global_tensors())
    assert all(torch.equal(tensor, own[name]) for name, tensor in former.global_tensors())


def test_a_wfm_of_another_size_is_refused(wfm: tuple[CosmosDiT, Path, Path]) -> None:
    model = DiffusionDecoderModel(diffusion_decoder_tiny(**SMALL, in_channels=8, out_channels=8), init_from=str(wfm[1]))
    with pytest.raises(UserError, match=r"x_embedder.proj.weight: got \[192, 72\], expected \[192, 36\]"):
        model.configure_model()
    with pytest.raises(UserError, match="no such file or checkpoint"):
        DiffusionDecoderModel(diffusion_decoder_tiny(**SMALL), init_from="nowhere").configure_model()


def test_a_training_step_hides_tokens_by_its_own_rate_and_moves_their_embedding() -> None:
    batch = {
        "latent": inputs()[0],
        "text_emb": inputs()[2],
        "fps": torch.tensor([10.0, 10.0]),
        "draw_id": torch.tensor([0, 1]),
        "tokens": tokens().clamp(min=1),
    }
    model = DiffusionDecoderModel(diffusion_decoder_tiny(**SMALL))
    assert torch.equal(model.noised(batch)["tokens"], batch["tokens"])
    model.conditioning = ConditioningConfig(condition_dropout=1.0)
    assert not model.noised(batch)["tokens"].any()
    model.conditioning = ConditioningConfig(condition_dropout=0.5)
    ids = torch.arange(64)
    many = {name: value[:1].expand(64, *value.shape[1:]) for name, value in batch.items()} | {"draw_id": ids}
    hidden = model.noised(many)["tokens"].flatten(1).eq(0).all(1)
    assert 16 < hidden.sum() < 48

    model.module = decoder()
    made = {**model.noised(batch), "tokens": batch["tokens"]}
    loss, _ = model.training_loss_reduction.forward(made, model.forward_step(made))
    loss.backward()
    used = model.module.token_embedder.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == batch["tokens"].unique().tolist()


def test_data_that_is_not_the_models_is_refused() -> None:
    latents = LatentCacheCard(
        tokenizer="c",
        tokenizer_fingerprint="c",
        continuous=True,
        latent_shape=(16, 3, 4, 4),
        num_frames=17,
        height=32,
        width=32,
        latent_mean=(0.0,) * 16,
        latent_std=(1.0,) * 16,
        text_encoder="t",
        text_dim=384,
        text_length=5,
    )
    codes = dataclasses.replace(
        latents, continuous=False, latent_shape=(3, 4, 4), vocab_size=16, latent_mean=(), latent_std=()
    )
    model = DiffusionDecoderModel(diffusion_decoder_tiny(**SMALL))
    model.check_data(latents, codes)
    for cards, message in (
        ((latents,), "no tokens"),
        ((latents, dataclasses.replace(codes, vocab_size=17)), "vocab_size of the tokens: got 17"),
        ((latents, dataclasses.replace(codes, latent_shape=(3, 2, 2))), "latent_shape of the tokens"),
        ((dataclasses.replace(latents, text_dim=8), codes), "text_dim"),
    ):
        with pytest.raises(UserError, match=message):
            model.check_data(*cards)


def test_windows_cover_a_video_and_the_last_ends_with_it() -> None:
    assert window_starts(8, window=8, overlap=2) == [0]
    assert window_starts(14, window=8, overlap=2) == [0, 6]
    assert window_starts(15, window=8, overlap=2) == [0, 6, 7]
    assert window_starts(5, window=3, overlap=2) == [0, 1, 2]
    with pytest.raises(UserError, match="overlap, window"):
        window_starts(5, window=2, overlap=2)


def test_windows_fade_into_each_other_and_their_first_frames_do_not_count() -> None:
    def estimate(frames: slice) -> torch.Tensor:
        told = torch.arange(frames.start, frames.stop).float()
        told[0] = 0 if frames.start == 0 else 100.0  # what a network makes of a frame that it takes for a picture
        return told.view(1, 1, -1, 1, 1)

    for num_frames in (8, 14, 15, 20):
        joined = blend_windows(estimate, num_frames, window=8, overlap=2).flatten()
        assert joined.tolist() == list(range(num_frames))
    three = blend_windows(lambda frames: torch.full((1, 1, 5, 1, 1), float(frames.start)), 7, window=5, overlap=3)
    assert three.flatten().tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_a_short_video_runs_to_and_fro_to_fill_a_window() -> None:
    assert reflected(5, 8) == [0, 1, 2, 3, 4, 3, 2, 1]  # as torch pads by reflection
    assert reflected(2, 8) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert reflected(1, 3) == [0, 0, 0]
    assert reflected(9, 8) == list(range(9))


def test_guidance_moves_away_from_neither_text_nor_tokens() -> None:
    network, edm = decoder(), EDM()
    noisy, _, text = inputs()
    given = {"network": network, "edm": edm, "fps": torch.full((2,), 10.0), "window": 3, "overlap": 2}
    sigma = torch.tensor(2.0)
    with torch.no_grad():
        cond = TokenDenoiser(**given, tokens=tokens(), text_emb=text, guidance=0.0)(noisy, sigma)
        uncond = TokenDenoiser(
            **given, tokens=torch.zeros_like(tokens()), text_emb=torch.zeros_like(text), guidance=0.0
        )(noisy, sigma)
        guided = TokenDenoiser(**given, tokens=tokens(), text_emb=text, guidance=1.8)(noisy, sigma)
        output = network(noisy * edm.c_in(sigma), (sigma.log() / 4).expand(2), text, fps=10.0, tokens_BTHW=tokens())
    assert (cond - uncond).abs().max() > 1e-2
    # Sums over another batch, and differences of them.
    torch.testing.assert_close(guided, cond + 1.8 * (cond - uncond), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cond, edm.c_skip(sigma) * noisy + edm.c_out(sigma) * output, atol=1e-5, rtol=1e-5)
