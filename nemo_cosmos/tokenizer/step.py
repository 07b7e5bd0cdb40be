"""The tokenizer as a NeMo model: what Lightning and Megatron's strategy need to train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm import fn
from nemo.lightning import io
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from torch import Tensor

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.loss import MeanLossReduction
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.startup import run_seed
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.context_parallel import Axis
from nemo_cosmos.tokenizer.initialization import initialize
from nemo_cosmos.tokenizer.losses import LossConfig, PerceptualDistance, psnr_db, reconstruction_loss
from nemo_cosmos.tokenizer.megatron_model import MegatronVideoTokenizer, check_layout
from nemo_cosmos.tokenizer.model import LATENT_MAKERS


@dataclass(kw_only=True)
class TokenizerModelConfig(TransformerConfig, io.IOMixin):
    """How a tokenizer is trained. Megatron's transformer fields have no meaning here and hold placeholders.

    Its parallel sizes have: tensor-parallel ranks divide channels, context-parallel ones the video, and of two pipeline
    stages the first has the encoder.
    """

    architecture: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What is built; `nemo_cosmos.tokenizer.config.PRESETS` has the published ones."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    init_from: str | None = None
    """Folder with weights to start from (`weights.save`), `default` for the embedded ones; None starts anew."""
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
        log: Called with (name, scalar) once per global batch.
        prefix: Put before the logged names.
    """

    def __init__(
        self,
        *,
        config: LossConfig,
        perceptual: PerceptualDistance | None,
        log: Callable[[str, Tensor], None],
        prefix: str,
    ) -> None:
        super().__init__()
        self.config, self.perceptual, self.log, self.prefix = config, perceptual, log, prefix

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives the loss of the reconstruction `forward_out` of `batch["video"]`, and its parts."""
        loss = reconstruction_loss(forward_out, batch["video"], config=self.config, perceptual=self.perceptual)
        # Cloned, because Megatron divides the loss in place by the number of micro-batches.
        parts = {"avg": loss.total.detach().clone(), "l1": loss.l1, "mse": loss.mse}
        return loss.total, {name: value.reshape(1) for name, value in parts.items()}

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Averages over micro-batches and ranks; logs L1 and the PSNR of the whole batch's mean squared error."""
        l1, mse = (
            super(ReconstructionLossReduction, self).reduce(
                [{"avg": entry[name]} for entry in losses_reduced_per_micro_batch]
            )
            for name in ("l1", "mse")
        )
        self.log(f"{self.prefix}l1", l1)
        self.log(f"{self.prefix}psnr_db", psnr_db(mse))
        return super().reduce(losses_reduced_per_micro_batch)


class TokenizerModel(pl.LightningModule, io.IOMixin, io.ConnectorMixin, fn.FNMixin):
    """Trains a tokenizer to rebuild its input. A batch is {"video": float32 [B, 3, T, H, W] in [-1, 1]}.

    Args:
        config: Architecture, loss, and Megatron's settings.
        optim: Optimizer and schedule; None for the reference's Adam.
        perceptual: Perceptual distance, needed where `config.loss` gives it weight.
    """

    def __init__(
        self,
        config: TokenizerModelConfig,
        optim: OptimizerModule | None = None,
        perceptual: PerceptualDistance | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.optim = optim or _reference_optimizer()
        self.optim.connect(self)
        self._loss_reductions = {
            prefix: ReconstructionLossReduction(
                config=config.loss, perceptual=perceptual, log=self._log_mean, prefix=prefix
            )
            for prefix in ("", "val_")
        }

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the model."""
        config = self.config.architecture
        return {"model": f"{config.compression_name}_{config.channels}", "config": config.to_dict()}

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds `self.module`, once. `vp_stage` is Megatron's; the tokenizer has no virtual stages."""
        if not hasattr(self, "module"):
            self.module = self.config.configure_model()

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Encodes and decodes: [B, 3, T, H, W] -> [B, 3, T, H, W]."""
        return self.module(video_BCTHW)

    def data_step(self, dataloader_iter: Iterator) -> dict[str, Tensor]:
        """Takes the next micro-batch to this rank's device."""
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch  # MegatronStrategy's loader adds two indices
        return {"video": batch["video"].to(current_device(), non_blocking=True)}

    def forward_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the batch's reconstruction; the loss reduction compares it with the batch."""
        return self(batch["video"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int | None = None) -> Tensor:
        """As `forward_step`."""
        return self.forward_step(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int | None = None) -> Tensor:
        """As `forward_step`."""
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> ReconstructionLossReduction:
        """Logs `l1` and `psnr_db`."""
        return self._loss_reductions[""]

    @property
    def validation_loss_reduction(self) -> ReconstructionLossReduction:
        """Logs `val_l1` and `val_psnr_db`."""
        return self._loss_reductions["val_"]

    def _log_mean(self, name: str, value: Tensor) -> None:
        self.log(name, value.to(torch.float32), prog_bar=True, batch_size=1)


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
