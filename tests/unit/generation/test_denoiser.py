import pytest
import torch

from nemo_cosmos.diffusion.conditioning import condition_mask
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.generation.denoiser import VideoDenoiser

SHAPE = torch.Size([2, 4, 3, 2, 2])


class NotingNetwork(torch.nn.Module):
    """Keeps what enters it; its output depends on all of that."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, c_noise, text, *, fps, condition_mask_B1THW, actions_BTA):
        assert len(x) == len(c_noise) == len(text) == len(fps) == len(condition_mask_B1THW) == len(actions_BTA)
        self.seen.append((x, text, condition_mask_B1THW))
        told = text.mean((1, 2)) + c_noise + actions_BTA.mean((1, 2))
        return x + told.view(-1, 1, 1, 1, 1) + condition_mask_B1THW


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _denoiser(**options):
    values = {
        "network": NotingNetwork(),
        "edm": EDM(),
        "text_emb": _normal(2, 2, 3, seed=1),
        "negative_text_emb": torch.zeros(2, 2, 3),
        "fps": torch.tensor([10.0, 10.0]),
        "given": torch.full(SHAPE, 0.25),
        "mask": condition_mask(torch.tensor([1, 1]), SHAPE),
        "augment_noise": _normal(*SHAPE, seed=3),
        "actions": _normal(2, 3, 4, seed=2),
        "video2world": True,
    }
    return VideoDenoiser(**{**values, **options})


def test_both_branches_run_in_one_batch_and_equal_two_runs():
    sigma, noisy = torch.tensor(3.0), _normal(*SHAPE, seed=0)
    together = _denoiser(guidance=2.0)
    result = together(noisy, sigma)
    assert len(together.network.seen) == 1
    cond = _denoiser()(noisy, sigma)
    uncond = _denoiser(text_emb=torch.zeros(2, 2, 3))(noisy, sigma)
    torch.testing.assert_close(result, cond + 2.0 * (cond - uncond))
    assert (cond != uncond).any()


def test_guidance_moves_away_from_the_negative_prompt():
    sigma, noisy = torch.tensor(3.0), _normal(*SHAPE, seed=0)
    results = [_denoiser(guidance=2.0, negative_text_emb=torch.full((2, 2, 3), v))(noisy, sigma) for v in (0.0, 1.0)]
    # The stub's output rises by one with the text, so the estimate falls by g c_out.
    difference = (results[0] - results[1])[:, :, 1:]
    torch.testing.assert_close(difference, torch.full_like(difference, 2.0 * EDM().c_out(sigma).item()))


@pytest.mark.parametrize("input_frames_guidance", [False, True])
def test_the_unconditional_branch_lacks_the_given_frames_where_guidance_is_on_them(input_frames_guidance):
    denoiser, sigma = _denoiser(guidance=2.0, input_frames_guidance=input_frames_guidance), torch.tensor(3.0)
    noisy = _normal(*SHAPE, seed=0)
    result = denoiser(noisy, sigma)
    [(both_x, both_text, both_mask)] = denoiser.network.seen
    (x, free_x), (text, free_text), (mask, free_mask) = (t.chunk(2) for t in (both_x, both_text, both_mask))
    level = torch.tensor(0.001)
    augmented = (denoiser.given + level * denoiser.augment_noise) * denoiser.edm.c_in(level)
    scaled, held = noisy * denoiser.edm.c_in(sigma), augmented[:, :, 0]
    for branch in (x, free_x):
        torch.testing.assert_close(branch[:, :, 1:], scaled[:, :, 1:])
    torch.testing.assert_close(x[:, :, 0], held)
    torch.testing.assert_close(free_x[:, :, 0], torch.zeros_like(held) if input_frames_guidance else held)
    assert mask[:, :, 0].eq(1).all() and mask[:, :, 1:].eq(0).all()
    assert free_mask.eq(0).all() if input_frames_guidance else torch.equal(free_mask, mask)
    assert torch.equal(text, denoiser.text_emb) and free_text.eq(0).all()
    assert torch.equal(result[:, :, 0], denoiser.given[:, :, 0])


def test_without_guidance_one_branch_runs():
    denoiser = _denoiser()
    denoiser(torch.zeros(SHAPE), torch.tensor(1.0))
    [(x, _, _)] = denoiser.network.seen
    assert len(x) == 2


def test_given_frames_are_free_where_the_latent_is_no_noisier_than_they():
    noisy = _normal(*SHAPE, seed=0)
    results = {s: _denoiser(augment_sigma=0.1)(noisy, torch.tensor(s))[:, :, 0] for s in (0.09, 0.11)}
    assert results[0.11].eq(0.25).all()
    assert results[0.09].ne(0.25).any()
