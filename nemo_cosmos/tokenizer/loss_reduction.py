"""The loss of a step as Megatron's schedules ask for it, and what is logged of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from einops import rearrange
from torch import Tensor

from nemo_cosmos.parallel.loss import MeanLossReduction
from nemo_cosmos.tokenizer.adversary import Adversary
from nemo_cosmos.tokenizer.losses import FlowEstimator, LossConfig, join_windows, psnr_db, reconstruction_loss
from nemo_cosmos.tokenizer.perceptual import PerceptualDistance


class ReconstructionLossReduction(MeanLossReduction):
    """Loss of a micro-batch, and the means that are logged.

    Args:
        config: Weights of the loss terms.
        perceptual: Perceptual distance, where its weight is positive.
        flow: Estimator of optical flow, where its weight is positive.
        adversary: What judges and learns, in training's adversarial stage.
        step: Tells the number of optimizer steps made.
        log: Called with scalars by name once per global batch.
    """

    def __init__(
        self,
        *,
        config: LossConfig,
        perceptual: PerceptualDistance | None,
        flow: FlowEstimator | None,
        adversary: Adversary | None,
        step: Callable[[], int],
        log: Callable[[dict[str, Tensor]], None],
    ) -> None:
        super().__init__()
        self.config, self.perceptual, self.flow, self.adversary = config, perceptual, flow, adversary
        self.step, self.log = step, log

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives the loss of the reconstruction `forward_out` of `batch["video"]`, and its parts."""
        video_BCTHW, reconstruction_BCTHW, windows_BNCTHW = batch["video"], forward_out, None
        if self.config.codes_windows(video_BCTHW, self.step()):
            windows_BNCTHW = rearrange(forward_out, "(B N) C T H W -> B N C T H W", B=video_BCTHW.shape[0])
            reconstruction_BCTHW = join_windows(windows_BNCTHW, stride=self.config.consistency_stride)
            video_BCTHW = video_BCTHW[:, :, : reconstruction_BCTHW.shape[2]]
        loss = reconstruction_loss(
            reconstruction_BCTHW,
            video_BCTHW,
            config=self.config,
            step=self.step(),
            perceptual=self.perceptual,
            flow=self.flow,
            windows_BNCTHW=windows_BNCTHW,
        )
        total, parts = loss.total, loss.parts
        if self.adversary is not None:
            term, discriminator = self.adversary.losses(reconstruction_BCTHW, video_BCTHW, step=self.step())
            total = total + term
            parts = {**parts, "adversarial": term.detach(), "discriminator": discriminator}
        # Cloned, because Megatron divides the loss in place by the number of micro-batches.
        parts = {"avg": total.detach().clone(), **parts}
        return total, {name: value.reshape(1) for name, value in parts.items()}

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Averages over micro-batches and ranks; logs the parts, and the PSNR of the whole batch's squared error."""
        means = {
            name: super(ReconstructionLossReduction, self).reduce(
                [{"avg": entry[name]} for entry in losses_reduced_per_micro_batch]
            )
            for name in losses_reduced_per_micro_batch[0]
        }
        loss, mse = means.pop("avg"), means.pop("mse")
        self.log({**means, "psnr_db": psnr_db(mse)})
        return loss
