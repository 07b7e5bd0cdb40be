import math

import pytest
import torch

from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.conditioning import ConditioningConfig, condition_mask, draw, network_input
from nemo_cosmos.diffusion.objective import EDM, per_sample, uncertainty_weighted_loss
from nemo_cosmos.errors import UserError

SHAPE = torch.Size([3, 4, 5, 6, 8])


def test_preconditioning_gives_unit_variance_in_and_target():
    edm, generator = EDM(), torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for sigma in torch.tensor([0.02, 0.5, 7.0], dtype=torch.float64):
        noisy = clean + sigma * noise
        target = (clean - edm.c_skip(sigma) * noisy) / edm.c_out(sigma)
        assert abs((noisy * edm.c_in(sigma)).std() - 1) < 0.01
        assert abs(target.std() - 1) < 0.01
        # The loss in the network's own output space has weight one at every level.
        assert edm.loss_weight(sigma) * edm.c_out(sigma) ** 2 == pytest.approx(1.0)


def test_video_noise_grows_with_the_square_root_of_the_frames():
    normal = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(EDM().sigma_of(normal, 9), 3 * EDM(adjust_video_noise=False).sigma_of(normal, 9))


def test_draws_follow_the_sample_not_its_place_in_the_batch():
    config = ConditioningConfig(min_condition_frames=1, max_condition_frames=2)
    together = draw(config, SHAPE, torch.tensor([7, 8, 9]), seed=3)
    alone = draw(config, torch.Size([1, *SHAPE[1:]]), torch.tensor([9]), seed=3)
    for name in ("sigma_normal", "noise", "augment_noise", "keep_text", "num_condition_frames"):
        assert torch.equal(getattr(together, name)[2], getattr(alone, name)[0])
    other = draw(config, SHAPE, torch.tensor([7, 8, 9]), seed=4)
    assert not torch.equal(other.noise, together.noise)


def test_dropout_rates_and_frame_counts_are_as_configured():
    config = ConditioningConfig(text_dropout=0.3, min_condition_frames=1, max_condition_frames=2, condition_dropout=0.1)
    draws = draw(config, torch.Size([4000, 1, 1, 1, 1]), torch.arange(4000), seed=0)
    assert abs(draws.keep_text.mean() - 0.7) < 0.03
    assert abs(draws.keep_frames.mean() - 0.9) < 0.03
    shares = [(draws.num_condition_frames == n).float().mean() for n in range(3)]
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(shares, (0, 0.5, 0.5), strict=True))


def test_noise_on_given_frames_is_log_normal_and_drawing_it_changes_no_other_draw():
    # The published law of post-training: ln(sigma) is N(-3, 2).
    shape, ids = torch.Size([4000, 1, 1, 1, 1]), torch.arange(4000)
    config = ConditioningConfig(max_condition_frames=2, augment_sigma=math.exp(-3), augment_p_std=2.0)
    drawn, fixed = (
        draw(config, shape, ids, seed=0),
        draw(ConditioningConfig(max_condition_frames=2), shape, ids, seed=0),
    )
    logs = drawn.augment_sigma.log()
    assert abs(logs.mean() + 3) < 0.1 and abs(logs.std() - 2) < 0.1  # three standard errors of 4000 draws
    assert fixed.augment_sigma.unique().tolist() == [pytest.approx(0.001)]
    for name in ("sigma_normal", "noise", "augment_noise", "keep_text", "num_condition_frames", "keep_frames"):
        assert torch.equal(getattr(drawn, name), getattr(fixed, name))


def test_each_samples_given_frames_carry_its_own_noise():
    edm, levels = EDM(), torch.tensor([0.01, 0.3, 4.0])
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    mask = condition_mask(torch.tensor([1, 1, 1]), SHAPE)
    scaled = network_input(edm, clean, torch.ones(3), clean, mask, noise, levels)
    for sample, level in enumerate(levels):
        expected = (clean + level * noise)[sample, :, 0] / (level**2 + 0.25).sqrt()
        torch.testing.assert_close(scaled[sample, :, 0], expected)


@pytest.mark.parametrize("settings", [{"augment_sigma": 0.0}, {"augment_p_std": -1.0}])
def test_impossible_noise_on_given_frames_is_refused(settings):
    with pytest.raises(UserError, match="augment_sigma, augment_p_std"):
        ConditioningConfig(**settings)


def test_given_frames_do_not_depend_on_the_noise_level():
    edm = EDM()
    clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    mask = condition_mask(torch.tensor([0, 1, 2]), SHAPE)
    inputs = []
    for sigma in (torch.full((3,), 0.1), torch.full((3,), 20.0)):
        noisy = clean + per_sample(sigma) * noise
        inputs.append(network_input(edm, noisy, sigma, clean, mask, noise, 0.001))
    given = mask.bool().expand(SHAPE)
    assert torch.equal(inputs[0][given], inputs[1][given])
    assert not torch.equal(inputs[0][~given], inputs[1][~given])
    torch.testing.assert_close(inputs[0][given], 2 * clean[given], atol=0.02, rtol=0)


def test_loss_counts_only_what_is_to_be_generated():
    clean = torch.zeros(SHAPE)
    denoised = clean.clone()
    denoised[:, :, 0] = 100.0
    denoised[:, :, 1:] = 0.5
    free = 1 - condition_mask(torch.ones(3, dtype=torch.int64), SHAPE)
    logvar = torch.tensor([0.0, 1.0, -1.0])
    loss, error = uncertainty_weighted_loss(denoised, clean, torch.full((3,), 2.0), logvar, free)
    torch.testing.assert_close(error, torch.full((3,), 0.5))
    torch.testing.assert_close(loss, 0.5 * (-logvar).exp() + logvar)


def test_actions_go_to_the_latent_frame_they_lead_to():
    actions = torch.zeros(1, 16, 7)
    actions[0, 8, 0], actions[0, 0, 6] = 0.01, 1.0
    grouped = actions_per_latent_frame(actions, 8)
    assert grouped.shape == (1, 3, 56)
    assert grouped[0, 0].abs().sum() == 0
    assert grouped[0, 1].nonzero().flatten().tolist() == [6]
    assert grouped[0, 2, 0] == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 6), r"actions: got \(1, 16, 6\), expected \[batch, frames - 1, 7\].* Give one row of seven numbers"),
        ((16, 7), r"actions: got \(16, 7\), expected \[batch, frames - 1, 7\]"),
        ((1, 15, 7), "number of actions: got 15, expected a positive multiple of 8. Cut or extend them"),
        ((1, 0, 7), "number of actions: got 0, expected a positive multiple of 8"),
    ],
)
def test_wrong_actions_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        actions_per_latent_frame(torch.zeros(shape), 8)
