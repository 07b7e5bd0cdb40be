"""Tokens to video through the diffusion decoder."""

import dataclasses

import pytest
import torch

from nemo_cosmos.autoregressive.diffusion_decoder.config import diffusion_decoder_7b, diffusion_decoder_tiny
from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import denormalise_latent
from nemo_cosmos.errors import UserError
from nemo_cosmos.generation.diffusion_decoder import DecodingConfig, DiffusionDecoder
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from tests.unit.generation.word_encoder import WordEncoder

FEW = DecodingConfig(num_steps=2, guidance=0.5)
MEAN, STD = (0.1,) * 16, (0.5,) * 16


def decoder(upsampling, *, num_codes=16, token_fingerprint="discrete"):
    torch.manual_seed(0)
    tokenizer = CausalVideoTokenizer(TokenizerConfig(channels=8, num_res_blocks=1)).eval()
    config = diffusion_decoder_tiny(
        num_layers=2, token_vocab_size=num_codes, init_token_levels=None, token_upsampling=upsampling
    )
    network = DiffusionDecoderDiT(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    card = CheckpointCard(
        model="test",
        config={},
        step=0,
        data="none",
        command="none",
        tokenizer_fingerprint=tokenizer.fingerprint(),
        token_fingerprint=token_fingerprint,
        latent_mean=MEAN,
        latent_std=STD,
    )
    return DiffusionDecoder(
        config=config,
        network=Stage.of(network),
        tokenizer=Stage.of(tokenizer),
        text_encoder=Stage.of(WordEncoder()),
        card=card,
    )


@pytest.fixture(scope="module")
def one():
    with initialize():
        yield decoder(1)


def tokens(*shape):
    return torch.randint(16, shape, generator=torch.Generator().manual_seed(2), dtype=torch.int32)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 3, 4, 6), (17, 32, 48)),
        ((1, 6, 3, 5), (41, 24, 40)),  # a long video, whose sides are no whole patches
        ((1, 1, 4, 4), (1, 32, 32)),
    ],
)
def test_video_has_the_size_that_the_tokens_tell(one, shape, size):
    video = one.decode(tokens(*shape), FEW)
    assert video.shape == (1, 3, *size)
    assert video.abs().max() <= 1


def test_a_missing_row_and_column_are_the_last_ones_again(one):
    some = tokens(1, 3, 3, 5)
    filled = torch.nn.functional.pad(some.float(), (0, 1, 0, 1), mode="replicate").int()
    latents = one.sample(filled, FEW, prompts=["a car"], seeds=[5])
    assert torch.equal(one.sample(some, FEW, prompts=["a car"], seeds=[5]), latents[..., :3, :5])


def test_tokens_of_a_coarser_grid_give_larger_video(one):
    assert decoder(2).decode(tokens(1, 3, 3, 2), FEW).shape == (1, 3, 17, 48, 32)


def test_a_seed_gives_a_video_whatever_the_batch(one):
    both, texts = tokens(2, 4, 4, 4), ["a car", "an elephant walks"]
    latents = one.sample(both, FEW, prompts=texts, seeds=[5, 6])
    again = one.sample(both[1:], FEW, prompts=texts[1:], seeds=[6])
    # Sums of a larger batch in another order, through two steps.
    torch.testing.assert_close(latents[1:], again, atol=1e-4, rtol=1e-4)
    default = one.sample(both, dataclasses.replace(FEW, seed=5), prompts=texts)
    assert torch.equal(default, latents)
    for other in (
        one.sample(both[1:], FEW, prompts=texts[1:], seeds=[7]),
        one.sample(both[1:], FEW, prompts=texts[:1], seeds=[6]),
        one.sample((both[1:] + 1) % 16, FEW, prompts=texts[1:], seeds=[6]),
        one.sample(both[1:], dataclasses.replace(FEW, guidance=0.0), prompts=texts[1:], seeds=[6]),
    ):
        assert (other - again).abs().max() > 1e-3


def test_latents_are_decoded_as_one_video(one):
    latent = one.sample(tokens(1, 5, 4, 4), FEW)
    with torch.no_grad():
        whole = one.tokenizer.use(lambda t: t.decode(denormalise_latent(latent / 0.5, MEAN, STD)))
    torch.testing.assert_close(one.decode(tokens(1, 5, 4, 4), FEW), whole.clamp(-1, 1), atol=1e-5, rtol=0)


def test_each_size_has_its_own_defaults():
    published = DecodingConfig().for_model(diffusion_decoder_7b(backend="torch"))
    assert (published.num_steps, published.guidance, published.window, published.overlap) == (15, 1.8, 8, 2)
    assert (published.sigma_max, published.sigma_min) == (8.0, 0.02)
    tiny = DecodingConfig(num_steps=3).for_model(diffusion_decoder_tiny())
    assert (tiny.num_steps, tiny.window) == (3, 3)


def test_what_does_not_fit_is_refused(one):
    one.check_tokens_of("discrete")
    with pytest.raises(UserError, match="takes tokens of tokenizer discrete, not of other"):
        one.check_tokens_of("other")
    with pytest.raises(UserError, match=r"tokens: got \(0, 16\), expected codes below 16"):
        one.decode(torch.tensor([[[[0, 16]]]]), FEW)
    with pytest.raises(UserError, match="integers"):
        one.decode(torch.zeros(1, 3, 4, 4), FEW)
    for argument in ({"prompts": ["one", "two"]}, {"seeds": [1, 2]}):
        with pytest.raises(UserError, match="one for each of 1 videos"):
            one.decode(tokens(1, 3, 4, 4), FEW, **argument)
    with pytest.raises(UserError, match="num_steps"):
        DecodingConfig(num_steps=0)
    card = dataclasses.replace(one.card, tokenizer_fingerprint="another")
    with pytest.raises(UserError, match="draws latents of tokenizer another"):
        dataclasses.replace(one, card=card)
