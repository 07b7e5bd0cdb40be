"""Cross entropy over a vocabulary that the tensor-parallel ranks share, with the normaliser that a z-loss needs.

Megatron's own gives the cross entropy alone, and counts the rows by which a vocabulary was padded.

Letters: s = tokens, B = batch, v = rows of the vocabulary on this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_cosmos.parallel.tokens import AutogradContext


def vocab_parallel_terms(
    logits_sBv: torch.Tensor, labels_sB: torch.Tensor, group: dist.ProcessGroup, *, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the two terms of a cross entropy, log Z - logit, which is their difference.

    Args:
        logits_sBv: This rank's part of the logits, in the order of the ranks; computed with in float32.
        labels_sB: Class of every token, int64 in [0, `vocab_size`).
        group: The ranks that share the vocabulary.
        vocab_size: Number of classes; further rows only pad the vocabulary and have no share in Z.

    Returns:
        log Z, the logarithm of the sum of all exponentiated logits, and the label's logit; float32 [s, B], the same on
        all ranks. The gradient with respect to each rank's logits is whole.
    """
    return _Terms.apply(logits_sBv, labels_sB, group, vocab_size)


class _Terms(torch.autograd.Function):
    """d log Z / d logits is the softmax, d logit / d logits the label's one-hot vector."""

    @staticmethod
    def forward(
        ctx: AutogradContext, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = group.rank() * logits.shape[-1]
        shifted = logits.float()
        shifted = shifted.clone() if shifted is logits else shifted
        shifted[..., max(vocab_size - start, 0) :] = -torch.inf
        largest = shifted.amax(dim=-1)
        _all_reduce(largest, group, dist.ReduceOp.MAX)
        own = labels - start
        elsewhere = (own < 0) | (own >= logits.shape[-1])
        own = own.masked_fill(elsewhere, 0)
        of_label = shifted.gather(-1, own[..., None]).squeeze(-1).masked_fill(elsewhere, 0.0)
        softmax = shifted.sub_(largest[..., None]).exp_()
        terms = torch.stack([softmax.sum(dim=-1), of_label])
        _all_reduce(terms, group, dist.ReduceOp.SUM)
        softmax.div_(terms[0][..., None])
        ctx.save_for_backward(softmax, own, elsewhere)
        ctx.dtype = logits.dtype
        return largest + terms[0].log(), terms[1]

    @staticmethod
    def backward(
        ctx: AutogradContext, grad_log_z: torch.Tensor, grad_of_label: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        softmax, own, elsewhere = ctx.saved_tensors
        grad = softmax * grad_log_z[..., None]
        grad.scatter_add_(-1, own[..., None], grad_of_label.masked_fill(elsewhere, 0.0)[..., None])
        return grad.to(ctx.dtype), None, None, None


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> None:
    if group.size() > 1:
        dist.all_reduce(x, op, group=group)
