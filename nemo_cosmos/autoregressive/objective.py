"""What the autoregressive transformer is trained to do: predict the next token of a video.

Letters: B = batch, T H W = latent frames, rows, columns, S = tokens of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class TokenSequences:
    """A batch of videos as the network takes them."""

    tokens_BS: torch.Tensor
    """int64; the begin of video where the model has one, the codes frame by frame and row by row, then padding."""
    labels_BS: torch.Tensor
    """int64; the code that follows each token, 0 where none does."""
    predicts_BS: torch.Tensor
    """bool; where a code follows."""
    counted_BS: torch.Tensor
    """bool; where one follows that is not given: what the cross entropy is of."""


def token_sequences(
    tokens_BTHW: torch.Tensor,
    config: ARConfig,
    *,
    num_condition_latents_t: int,
    loss_mask_BTHW: torch.Tensor | None = None,
    multiple_of: int = 1,
) -> TokenSequences:
    """Makes sequences and labels of a batch of tokenized videos.

    Args:
        tokens_BTHW: Codes, any integer type.
        config: Of the model.
        num_condition_latents_t: Latent frames given from the start, whose tokens are not learned.
        loss_mask_BTHW: bool; tokens that are to be learned besides; None for all.
        multiple_of: Sequences are padded to such a length.

    Raises:
        UserError: A token is no code, all frames are given, or there is nothing to pad with.
    """
    num_frames = tokens_BTHW.shape[1]
    if not 0 <= num_condition_latents_t < num_frames:
        raise user_error(
            "num_condition_latents_t",
            num_condition_latents_t,
            f"fewer than the {num_frames} latent frames of a sample",
            "Lower it, or train on longer videos.",
        )
    least, most = tokens_BTHW.min().item(), tokens_BTHW.max().item()
    if least < 0 or most >= config.vocab_size:
        raise user_error(
            "tokens",
            f"{least} to {most}",
            f"0 to {config.vocab_size - 1}, the model's vocab_size",
            "Tokenize with the tokenizer that the model is made for.",
        )
    free_BTHW = torch.ones_like(tokens_BTHW, dtype=torch.bool) if loss_mask_BTHW is None else loss_mask_BTHW.bool()
    free_BTHW = free_BTHW & (torch.arange(num_frames) >= num_condition_latents_t).view(1, -1, 1, 1)
    codes_BN, free_BN = tokens_BTHW.flatten(1).long(), free_BTHW.flatten(1)
    length = config.num_first + codes_BN.shape[1]
    padding = -length % multiple_of
    if padding and not config.special_tokens:
        raise user_error(
            "tokens of a sample",
            length,
            f"a multiple of {multiple_of}, for the model has no token to pad with",
            "Change the video's size or length, or use fewer ranks.",
        )
    tokens = functional.pad(codes_BN, (config.num_first, 0), value=config.begin_of_video)
    # Position i of the labels is the code after token i: one further than in the tokens.
    labels_BS = functional.pad(codes_BN[:, 1 - config.num_first :], (0, padding + 1))
    predicts_BS = functional.pad(torch.ones_like(free_BN)[:, 1 - config.num_first :], (0, padding + 1))
    counted_BS = functional.pad(free_BN[:, 1 - config.num_first :], (0, padding + 1))
    return TokenSequences(
        tokens_BS=functional.pad(tokens, (0, padding), value=config.padding),
        labels_BS=labels_BS,
        predicts_BS=predicts_BS,
        counted_BS=counted_BS,
    )


def next_token_loss(
    log_z_BS: torch.Tensor,
    logit_BS: torch.Tensor,
    predicts_BS: torch.Tensor,
    counted_BS: torch.Tensor,
    *,
    z_loss_coeff: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the codes to be learned, and a z-loss that holds the softmax's normaliser near one.

    Samples count alike, so that the loss does not depend on how they are shared out over micro-batches and ranks; where
    as many frames are given in all of them, it is the published one. As there, the z-loss is also of codes that are
    given.

    Args:
        log_z_BS: Logarithm of the normaliser.
        logit_BS: Of the label.
        predicts_BS: bool; where there is a label.
        counted_BS: bool; where it is to be learned.
        z_loss_coeff: Weight of the z-loss, the mean of (log Z)^2.

    Returns:
        The loss and the cross entropy alone, in nats per code, both [B].

    Source:
        Cosmos report (arXiv 2501.03575), section 5.2; de Brébisson and Vincent, https://arxiv.org/abs/1604.08859, and
        Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311, section 5, for the z-loss.
    """
    cross_entropy_B = mean_where(log_z_BS - logit_BS, counted_BS)
    z_loss_B = mean_where(log_z_BS.square(), predicts_BS)
    return cross_entropy_B + z_loss_coeff * z_loss_B, cross_entropy_B


def mean_where(values_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """Mean of each sample's values where the mask holds, 0 where it never does; [B], or [B, ...] of further axes."""
    # A mask may leave a sample nothing to be learned.
    return (values_BS * mask_BS).sum(dim=1) / mask_BS.sum(dim=1).clamp(min=1)
