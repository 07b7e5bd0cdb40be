"""The tokenizer as a NeMo model: what Lightning and Megatron's strategy need to train it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from einops import rearrange
from megatron.core.optimizer import OptimizerConfig
from nemo.collections.llm import fn
from nemo.lightning import io
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from nemo.utils import logging
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.replicated import check_same_on_all_ranks
from nemo_cosmos.tokenizer.adversary import Adversary
from nemo_cosmos.tokenizer.loss_reduction import ReconstructionLossReduction
from nemo_cosmos.tokenizer.losses import FlowEstimator, check_measures, cut_windows
from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
from nemo_cosmos.tokenizer.perceptual import PerceptualDistance

_MEASURED_BY = "measured_by"
"""In checkpoints and their cards: names of what measures the loss terms."""


class TokenizerModel(pl.LightningModule, io.IOMixin, io.ConnectorMixin, fn.FNMixin):
    """Trains a tokenizer to rebuild its input.

    A batch is {"video": float32 [B, 3, T, H, W] in [-1, 1]}, or [B, K, 3, 1, H, W] where a sample is K pictures; for a
    tokenizer of images T is 1.

    Args:
        config: Architecture, loss, and Megatron's settings.
        optim: Optimizer and schedule; None for the reference's Adam.
        perceptual: Perceptual distance, needed where `config.loss` gives it weight.
        flow: Estimator of optical flow, needed where `config.loss` gives it weight.
        adversary: The discriminator and its training, for the adversarial stage.
        init_from: In place of the config's; post-training gives it once it has found its base.

    Raises:
        UserError: A term of the loss has weight, now or later, but nothing measures it.
    """

    def __init__(
        self,
        config: TokenizerModelConfig,
        optim: OptimizerModule | None = None,
        perceptual: PerceptualDistance | None = None,
        flow: FlowEstimator | None = None,
        adversary: Adversary | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        check_measures(config.loss, perceptual, flow)
        self.config = config if init_from is None else dataclasses.replace(config, init_from=init_from)
        self.init_from = self.config.init_from
        self.optim = optim or _reference_optimizer()
        self.optim.connect(self)
        self.step_figures: dict[str, Tensor] = {}
        self._adversary = adversary
        shared = {"config": config.loss, "perceptual": perceptual, "flow": flow, "step": self._steps_made}
        # In a dict, so that torch does not take them for parts of the model.
        self._loss_reductions = {
            "train": ReconstructionLossReduction(**shared, adversary=adversary, log=self._log_training),
            "val": ReconstructionLossReduction(**shared, adversary=None, log=self._log_validation),
        }
        measures = {"perceptual": perceptual, "flow": flow, "adversarial": adversary}
        self._measured_by = {
            term: getattr(measure, "name", type(measure).__name__)
            for term, measure in measures.items()
            if measure is not None
        }

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the model."""
        config = self.config.architecture
        return {
            "model": f"{config.compression_name}_{config.channels}",
            "config": config.to_dict(),
            _MEASURED_BY: self._measured_by,
        }

    def configure_callbacks(self) -> list[pl.Callback]:
        """Brings the adversary into the trainer's events."""
        return [] if self._adversary is None else [self._adversary]

    def setup(self, stage: str) -> None:
        """Asks the data module, where it knows them by `sample_sizes()`, for the sizes that training will see.

        Raises:
            UserError: One does not fit the compression, or is too small for this layout. No weight is allocated yet.
        """
        sample_sizes = getattr(self.trainer.datamodule, "sample_sizes", None)
        for size in () if sample_sizes is None else sample_sizes():
            self.config.check_size(*size)

    def on_fit_start(self) -> None:
        """Tells what measures the loss terms.

        Raises:
            UserError: It is not the same on all ranks, because some could not fetch weights.
        """
        for term, name in self._measured_by.items():
            check_same_on_all_ranks(f"measure of the {term} loss", name)
            logging.info(f"The {term} loss is measured by: {name}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes what measures the loss terms."""
        checkpoint[_MEASURED_BY] = self._measured_by

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses to go on with another loss.

        Raises:
            UserError: A loss term is measured by something else than in the resumed run.
        """
        saved = checkpoint.get(_MEASURED_BY, self._measured_by)
        if saved != self._measured_by:
            raise user_error(
                "loss terms", self._measured_by, f"{saved} as in the resumed run", "Give the same weights."
            )

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds `self.module`, once. `vp_stage` is Megatron's; the tokenizer has no virtual stages.

        Raises:
            UserError: The layout does not suit the model or its training.
        """
        if self._adversary is not None and self.config.pipeline_model_parallel_size > 1:
            expected = "None with two pipeline stages, of which the first sees no reconstruction"
            raise user_error("adversary", self._adversary, expected, "Use one stage, and other kinds of parallelism.")
        if not hasattr(self, "module"):
            self.module = self.config.configure_model()

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes: [B, 3, T, H, W] -> [B, 3, T, H, W]."""
        return self.module(video_BCTHW)

    def data_step(self, dataloader_iter: Iterator) -> dict[str, Tensor]:
        """Takes the next micro-batch to this rank's device."""
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch  # MegatronStrategy's loader adds two indices
        video = batch["video"].to(current_device(), non_blocking=True)
        return {"video": rearrange(video, "B K C T H W -> (B K) C T H W") if video.ndim == 6 else video}

    def forward_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the reconstruction of the batch, or of its windows; the loss reduction compares it with the batch."""
        video_BCTHW, loss = batch["video"], self.config.loss
        if not loss.codes_windows(video_BCTHW, self._steps_made()):
            return self(video_BCTHW)
        windows = cut_windows(video_BCTHW, num_frames=loss.consistency_frames, stride=loss.consistency_stride)
        return self(rearrange(windows, "B N C T H W -> (B N) C T H W"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int | None = None) -> Tensor:
        """As `forward_step`."""
        return self.forward_step(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int | None = None) -> Tensor:
        """As `forward_step`."""
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> ReconstructionLossReduction:
        """Logs `l1`, `psnr_db` and the loss's other parts."""
        return self._loss_reductions["train"]

    @property
    def validation_loss_reduction(self) -> ReconstructionLossReduction:
        """Logs the same, each with `val_` before it; there is no adversarial part."""
        return self._loss_reductions["val"]

    def _steps_made(self) -> int:
        return self.trainer.global_step

    def _log_training(self, means: dict[str, Tensor]) -> None:
        self.step_figures = means
        self._log_means(means)

    def _log_validation(self, means: dict[str, Tensor]) -> None:
        self._log_means({f"val_{name}": mean for name, mean in means.items()})

    def _log_means(self, means: dict[str, Tensor]) -> None:
        for name, mean in means.items():
            self.log(name, mean.float(), prog_bar=True, batch_size=1)


def _reference_optimizer() -> MegatronOptimizerModule:
    """Adam with the values that the reference trains its tokenizers with.

    Source: NVIDIA cosmos-predict1, `tokenizer/training` configurations.
    """
    return MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            adam_beta1=0.5,
            adam_beta2=0.999,
            weight_decay=0.01,
            use_distributed_optimizer=True,
        )
    )
