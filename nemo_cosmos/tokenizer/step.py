"""The tokenizer as a NeMo model: what Lightning and Megatron's strategy need to train it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from einops import rearrange
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm import fn
from nemo.lightning import io
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from nemo.utils import logging
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.loss import MeanLossReduction
from nemo_cosmos.parallel.replicated import check_same_on_all_ranks
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import run_seed
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.adversary import Adversary
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Axis
from nemo_cosmos.tokenizer.initialization import initialize
from nemo_cosmos.tokenizer.losses import (
    FlowEstimator,
    LossConfig,
    check_measures,
    cut_windows,
    join_windows,
    psnr_db,
    reconstruction_loss,
)
from nemo_cosmos.tokenizer.megatron_model import MegatronVideoTokenizer, check_layout
from nemo_cosmos.tokenizer.model import LATENT_MAKERS
from nemo_cosmos.tokenizer.perceptual import PerceptualDistance

_MEASURED_BY = "measured_by"
"""In checkpoints and their cards: names of what measures the loss terms."""


@dataclass(kw_only=True)
class TokenizerModelConfig(TransformerConfig, io.IOMixin):
    """How a tokenizer is trained. Megatron's transformer fields have no meaning here and hold placeholders.

    Its parallel sizes have: tensor-parallel ranks divide channels, context-parallel ones the video, and of two pipeline
    stages the first has the encoder.
    Of its fields for recomputation `recompute_granularity="full"` counts, see `recompute.recompute_activations`.
    """

    architecture: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What is built; `nemo_cosmos.tokenizer.config.PRESETS` has the published ones."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    init_from: str | None = None
    """Weights to start from, as `weights.load` takes them, `default` for the embedded ones; None starts anew."""
    freeze_encoder: bool = False
    """Train the decoder alone; latents, and all that was trained on them, stay valid."""
    context_parallel_axis: Axis = "height"
    """What context-parallel ranks divide: rows of the picture, or frames, which needs longer videos."""
    num_layers: int = 1
    hidden_size: int = 1
    num_attention_heads: int = 1
    moe_token_dispatcher_type: str = "alltoall"
    variable_seq_lengths: bool = True
    """Pipeline stages tell each other the size of what they send, for it follows the videos."""

    def __post_init__(self) -> None:
        """Makes the checks of Megatron, whose placeholders must divide by the layout's sizes; NeMo calls it again."""
        self.num_layers = self.pipeline_model_parallel_size
        self.hidden_size = self.num_attention_heads = self.num_query_groups = self.tensor_model_parallel_size
        super().__post_init__()

    def configure_model(self) -> MegatronVideoTokenizer:
        """Builds the tokenizer of this rank.

        Raises:
            UserError: The model cannot be split in this layout, or the initial weights do not fit the architecture.
        """
        self._check()
        # One seed for all ranks, which cut the same whole weights.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run_seed())
            tokenizer = MegatronVideoTokenizer(self.architecture, self)
            if self.init_from is None:
                initialize(tokenizer)
            else:
                tokenizer.load_state_dict(self._initial_weights())
        if self.freeze_encoder:
            for name, parameter in tokenizer.named_parameters():
                parameter.requires_grad_(not name.startswith(LATENT_MAKERS))
        if self._is_split:
            groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
            tokenizer.split(groups, **stage_ends(None), context_parallel_axis=self.context_parallel_axis)
        return tokenizer

    @property
    def _is_split(self) -> bool:
        sizes = (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size)
        return max(sizes) > 1

    def _check(self) -> None:
        check_layout(self.architecture, self, self.context_parallel_axis)
        if self.freeze_encoder and self.pipeline_model_parallel_size > 1:
            raise user_error(
                "freeze_encoder", True, "False with two pipeline stages", "Use one: the first learns nothing."
            )

    def _initial_weights(self) -> dict[str, Tensor]:
        start = weights.load_default() if self.init_from == "default" else weights.load(self.init_from)
        if start.tokenizer_config != self.architecture:
            raise user_error(
                "init_from", start.tokenizer_config, f"weights of {self.architecture}", "Choose its architecture."
            )
        return start.state_dict()


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


class TokenizerModel(pl.LightningModule, io.IOMixin, io.ConnectorMixin, fn.FNMixin):
    """Trains a tokenizer to rebuild its input.

    A batch is {"video": float32 [B, 3, T, H, W] in [-1, 1]}, or [B, K, 3, 1, H, W] where a sample is K pictures.

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
            self.log(name, mean.to(torch.float32), prog_bar=True, batch_size=1)


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
