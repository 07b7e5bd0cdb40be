"""Sequences, labels and the loss."""

from __future__ import annotations

import pytest
import torch

from nemo_cosmos.autoregressive.objective import next_token_loss, token_sequences
from nemo_cosmos.errors import UserError
from tests.unit.autoregressive.test_model import WITH_TEXT, config_for

CODES = torch.arange(12, dtype=torch.int32).view(1, 3, 2, 2)


def test_labels_are_the_codes_that_follow() -> None:
    made = token_sequences(CODES, config_for(), num_condition_latents_t=1)
    assert made.tokens_BS.tolist() == [list(range(12))] and made.tokens_BS.dtype == torch.int64
    assert made.labels_BS.tolist() == [[*range(1, 12), 0]]
    assert made.predicts_BS.tolist() == [[True] * 11 + [False]]
    # The first frame has four codes; the first to be learned follows the last of them.
    assert made.counted_BS.tolist() == [[False] * 3 + [True] * 8 + [False]]


def test_special_tokens_begin_and_pad() -> None:
    config = config_for(**WITH_TEXT)
    made = token_sequences(CODES, config, num_condition_latents_t=2, multiple_of=8)
    assert made.tokens_BS.tolist() == [[50, *range(12), 52, 52, 52]]
    assert made.labels_BS.tolist() == [[*range(12), 0, 0, 0, 0]]
    assert made.predicts_BS.tolist() == [[True] * 12 + [False] * 4]
    assert made.counted_BS.tolist() == [[False] * 8 + [True] * 4 + [False] * 4]
    picture = token_sequences(CODES[:, :1], config, num_condition_latents_t=0)
    assert picture.counted_BS.tolist() == [[True] * 4 + [False]]


def test_a_mask_takes_tokens_out() -> None:
    free = torch.ones(CODES.shape, dtype=torch.bool)
    free[0, 1, 0, 1] = False
    made = token_sequences(CODES, config_for(), num_condition_latents_t=1, loss_mask_BTHW=free)
    assert made.labels_BS[made.counted_BS].tolist() == [4, 6, 7, 8, 9, 10, 11]
    assert made.predicts_BS.sum() == 11


def test_the_loss_is_cross_entropy_with_z_loss() -> None:
    """As published: of equally long conditions the mean over all that is learned, and (log Z)^2 over all labels."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(50, (2, 3, 2, 2), generator=generator)
    made = token_sequences(codes, config_for(), num_condition_latents_t=1)
    logits = 3 * torch.randn(2, 12, 50, generator=generator)
    log_z = logits.logsumexp(-1)
    loss, cross_entropy = next_token_loss(
        log_z,
        logits.gather(-1, made.labels_BS[..., None]).squeeze(-1),
        made.predicts_BS,
        made.counted_BS,
        z_loss_coeff=0.1,
    )
    ignored = made.labels_BS.masked_fill(~made.counted_BS, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ignored.flatten())
    torch.testing.assert_close(cross_entropy.mean(), expected)
    torch.testing.assert_close(loss.mean(), expected + 0.1 * log_z[:, :-1].square().mean())


def test_a_sample_without_anything_to_learn_is_no_nan() -> None:
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    loss, _ = next_token_loss(torch.ones(1, 4), torch.zeros(1, 4), nothing, nothing, z_loss_coeff=1.0)
    assert loss.tolist() == [0.0]


@pytest.mark.parametrize(
    ("codes", "arguments", "message"),
    [
        (CODES, {"num_condition_latents_t": 3}, "num_condition_latents_t: got 3, expected fewer than the 3 latent"),
        (CODES + 39, {"num_condition_latents_t": 1}, "tokens: got '39 to 50', expected 0 to 49"),
        (
            CODES,
            {"num_condition_latents_t": 1, "multiple_of": 8},
            "got 12, expected a multiple of 8, .*no token to pad",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(codes: torch.Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        token_sequences(codes, config_for(), **arguments)
