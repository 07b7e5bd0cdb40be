"""The autoregressive WFM as a NeMo Lightning module: what one training step does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import move_data_to_device
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from torch import nn

from nemo_cosmos.autoregressive.architecture import architecture_of
from nemo_cosmos.autoregressive.config import ARConfig, check_layout
from nemo_cosmos.autoregressive.flops import training_flops
from nemo_cosmos.autoregressive.medusa import freeze_trunk, medusa_loss, of_later_tokens
from nemo_cosmos.autoregressive.model import CosmosAR, LabelTerms
from nemo_cosmos.autoregressive.objective import next_token_loss, token_sequences
from nemo_cosmos.autoregressive.warm_start import load_whole_weights
from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.shuffle import pictures_one_by_one
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.loss import MeanLossReduction
from nemo_cosmos.parallel.stages import stage_ends
from nemo_cosmos.parallel.tokens import causal_unit
from nemo_cosmos.transformer.actions import scaled_actions

Batch = dict[str, Any]
"""Tensors by name."""

_PAD_TO = 64
"""Length that sequences with special tokens are a multiple of, as published; more where the layout asks for it."""


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """What is given, what is learned, and how it is weighed."""

    num_condition_latents_t: int = 1
    """Latent frames given from the start. A picture, of one latent frame, is given none."""
    z_loss_coeff: float = 1e-4
    """Weight of the z-loss."""
    text_dropout: float = 0.0
    """Probability of replacing a sample's text states by zeros."""
    medusa_weight: float = 1.0
    """Weight of the Medusa heads' loss, where the model has heads."""
    medusa_only: bool = False
    """Whether the heads alone learn, so that the model's own predictions stay as they are (Medusa-1)."""

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("num_condition_latents_t", "z_loss_coeff", "medusa_weight"):
            if getattr(self, name) < 0:
                raise user_error(name, getattr(self, name), "0 or more", "Correct the recipe.")
        if not 0 <= self.text_dropout <= 1:
            raise user_error("text_dropout", self.text_dropout, "a probability in [0, 1]", "Correct the recipe.")


class NextTokenLossReduction(MeanLossReduction):
    """Loss of a micro-batch, from the label terms that the last pipeline stage gives.

    Args:
        objective: How it is weighed.
    """

    def __init__(self, objective: NextTokenConfig) -> None:
        super().__init__()
        self._objective = objective

    def forward(self, batch: Batch, forward_out: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Batch]:
        """Cross entropy of what is to be learned, the z-loss and the Medusa heads' loss; samples count alike."""
        # Megatron's wrapper for mixed precision hands on plain tuples.
        terms, counted = LabelTerms(*forward_out), batch["counted"]
        has_heads = terms.log_z.ndim == 3
        own = LabelTerms(*(term[..., 0] for term in terms)) if has_heads else terms
        loss_B, cross_entropy_B = next_token_loss(
            *own, batch["predicts"], counted, z_loss_coeff=self._objective.z_loss_coeff
        )
        if has_heads:
            heads_B, _ = medusa_loss(*terms, of_later_tokens(counted, terms.log_z.shape[-1] - 1))
            loss_B = loss_B + self._objective.medusa_weight * heads_B
        loss = loss_B.mean()
        # Cloned, because Megatron scales the loss in place.
        return loss, {
            "avg": loss.detach().clone().view(1),
            "cross_entropy": cross_entropy_B.detach().mean().view(1),
        }


class AutoregressiveModel(pl.LightningModule, io.IOMixin, io.ConnectorMixin):
    """A Cosmos autoregressive WFM under next-token prediction.

    Args:
        config: The network.
        objective: What is given and how the loss is weighed.
        optim: Optimizer; AdamW when absent.
        init_from: Safetensors file of whole weights to start from; None starts anew.
        may_lack: Prefixes of names that `init_from` may lack, see `warm_start`; such weights keep their first values.
        seed: Of the draws of text dropout.
    """

    def __init__(
        self,
        config: ARConfig,
        *,
        objective: NextTokenConfig | None = None,
        optim: OptimizerModule | None = None,
        init_from: str | None = None,
        may_lack: tuple[str, ...] = (),
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or NextTokenConfig()
        self.init_from, self.may_lack = init_from, may_lack
        self.seed = seed
        self.optim = optim or MegatronOptimizerModule(
            config=OptimizerConfig(lr=1e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, bf16=config.bf16)
        )
        self.optim.connect(self)
        self._work = (0, 0)
        self._training_loss: NextTokenLossReduction | None = None
        self._validation_loss: NextTokenLossReduction | None = None

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the model."""
        size = f"{self.config.num_layers}x{self.config.hidden_size}"
        kind = "" if self.config.crossattn_emb_channels is None else "_video2world"
        kind = kind if self.config.action_dim is None else "_action"
        return {"model": f"autoregressive_{size}{kind}", "config": architecture_of(self.config)}

    def check_data(self, *cards: LatentCacheCard, with_actions: bool | None = None) -> None:
        """Refuses tokens that the network cannot take in its layout; the strategy calls it before anything is built.

        Args:
            *cards: Of the caches that are trained on.
            with_actions: Whether samples carry actions; None where it is not known.

        Raises:
            UserError: Latents are continuous, the vocabulary or the text's width is not the model's, all frames would
                be given, the ranks cannot share the tokens, or samples lack the actions that the network takes, or have
                some that it does not take; or only heads learn, and a pipeline stage would have none.
        """
        config = self.config
        if self.objective.medusa_only and config.pipeline_model_parallel_size > 1:
            # Megatron's distributed optimizer cannot be saved on a stage where nothing learns.
            raise user_error(
                "pipeline-parallel size",
                config.pipeline_model_parallel_size,
                "1 with medusa_only, for only the last stage has heads",
                "Use tensor-parallel ranks; the frozen weights need no optimizer states.",
            )
        if with_actions not in (None, config.action_dim is not None):
            raise user_error(
                "with_actions of the data",
                with_actions,
                f"{not with_actions}, for the model has action_dim {config.action_dim}",
                "Change one of the two.",
            )
        for card in cards:
            if card.continuous or len(card.latent_shape) != 3:
                raise user_error(
                    "latent_shape of the cache",
                    card.latent_shape,
                    "[T, H, W], codes of a discrete tokenizer",
                    "Write another cache with a DV tokenizer.",
                )
            if card.vocab_size not in (None, config.vocab_size):
                raise user_error(
                    "vocab_size of the cache",
                    card.vocab_size,
                    f"{config.vocab_size}, the model's vocab_size",
                    "Tokenize with the tokenizer that the model is made for, or change the model.",
                )
            if config.crossattn_emb_channels not in (None, card.text_dim):
                raise user_error(
                    "text_dim of the cache",
                    card.text_dim,
                    f"{config.crossattn_emb_channels}, the model's crossattn_emb_channels",
                    "Tokenize with the text encoder that the model is made for, or change the model.",
                )
            self._num_condition_latents(card.latent_shape[0])
            length = config.num_first + math.prod(card.latent_shape)
            check_layout(
                config,
                config.tensor_model_parallel_size,
                config.pipeline_model_parallel_size,
                config.context_parallel_size,
                length + -length % self._multiple_of,
            )

    @property
    def _multiple_of(self) -> int:
        """What sequences are padded to; 1 where the model has no token to pad with."""
        if not self.config.special_tokens:
            return 1
        tensor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return math.lcm(_PAD_TO, causal_unit(self.config.context_parallel_size, tensor))

    def _num_condition_latents(self, num_frames: int) -> int:
        given = 0 if num_frames == 1 else self.objective.num_condition_latents_t
        if given >= num_frames:
            raise user_error(
                "num_condition_latents_t",
                given,
                f"fewer than the {num_frames} latent frames of a sample",
                "Lower it, or train on longer videos.",
            )
        return given

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's share of the network, once the process groups are there."""
        if not hasattr(self, "module"):
            if self.config.virtual_pipeline_model_parallel_size is not None:
                vp_stage = vp_stage or 0  # Lightning builds the first chunk and knows of no others.
            self.module: nn.Module = CosmosAR(self.config, vp_stage=vp_stage, **stage_ends(vp_stage))
            if self.init_from is not None:
                load_whole_weights(self.module, self.init_from, may_lack=self.may_lack)
            if self.objective.medusa_only:
                freeze_trunk(self.module)

    def reinit(self) -> AutoregressiveModel:
        """Gives a module for a further chunk of an interleaved pipeline; called by NeMo.

        NeMo's own way would build the configuration anew from its arguments, without the layout that the strategy has
        put into it since.
        """
        return AutoregressiveModel(
            self.config, objective=self.objective, init_from=self.init_from, may_lack=self.may_lack, seed=self.seed
        )

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | LabelTerms:  # noqa: ANN401 - hands on to the network
        """The network; see `CosmosAR.forward`."""
        return self.module(*args, **kwargs)

    def data_step(self, dataloader_iter: Iterator[Any]) -> Batch:
        """Takes the next batch and makes the network's input from it; the same on every pipeline stage."""
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch
        made = self.sequences(batch)
        self._count(made)
        return move_data_to_device(made, current_device())

    def sequences(self, batch: Batch) -> Batch:
        """Makes sequences and labels of a batch of tokenized videos.

        Args:
            batch: `tokens` (int32 [B, T, H, W]; or [B, N, 1, H, W], samples of N pictures); `loss_mask` (bool as
                `tokens`, True where a token is to be learned), where not all are; `text_emb` ([B, L, C], padding
                zeroed) where the network takes text, `actions` (float32 [B, F-1, ACTION_DIM]) where it takes them, and
                `draw_id` (int64 [B]) where text is dropped or there are samples of pictures.

        Returns:
            The network's inputs and what the loss is of.

        Raises:
            UserError: A token is no code of the model's vocabulary, or all frames are given.
        """
        batch = pictures_one_by_one(batch) if batch["tokens"].ndim == 5 else batch
        grid = tuple(batch["tokens"].shape[1:])
        made = token_sequences(
            batch["tokens"],
            self.config,
            num_condition_latents_t=self._num_condition_latents(grid[0]),
            loss_mask_BTHW=batch.get("loss_mask"),
            multiple_of=self._multiple_of,
        )
        given = {
            "tokens": made.tokens_BS,
            "labels": made.labels_BS,
            "predicts": made.predicts_BS,
            "counted": made.counted_BS,
            "grid": grid,
        }
        if self.config.crossattn_emb_channels is not None:
            given["text_emb"] = batch["text_emb"]
            if self.objective.text_dropout > 0:
                keep_B = _keep_text(self.objective.text_dropout, batch["draw_id"], seed=self.seed)
                given["text_emb"] = batch["text_emb"] * keep_B.view(-1, 1, 1)
        if self.config.action_dim is not None:
            given["actions"] = scaled_actions(batch["actions"])
        return given

    def take_work(self) -> tuple[int, int]:
        """Gives the tokens and the floating-point operations of the batches since the last call, and forgets them.

        Those of this data-parallel rank, over all ranks that share its batches.
        """
        work, self._work = self._work, (0, 0)
        return work

    def _count(self, batch: Batch) -> None:
        tokens, flops = self._work
        num_samples, length = batch["tokens"].shape
        text_length = sum(batch[name].shape[1] for name in ("text_emb", "actions") if name in batch)
        flops += training_flops(self.config, length, text_length=text_length, num_samples=num_samples)
        self._work = (tokens + num_samples * length, flops)

    def forward_step(self, batch: Batch) -> torch.Tensor | LabelTerms:
        """Runs the network."""
        labels, heads = batch["labels"], self.config.num_medusa_heads
        return self.forward(
            batch["tokens"],
            batch["grid"],
            batch.get("text_emb"),
            labels_BS=of_later_tokens(labels, heads) if heads else labels,
            actions_BFA=batch.get("actions"),
        )

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> Any:  # noqa: ANN401 - see forward_step
        """Lightning's name for `forward_step`."""
        return self.forward_step(batch)

    def validation_step(self, batch: Batch, batch_idx: int | None = None) -> Any:  # noqa: ANN401 - see forward_step
        """Lightning's name for `forward_step`."""
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> MegatronLossReduction:
        """The loss, as Megatron's schedules want it."""
        if self._training_loss is None:
            self._training_loss = NextTokenLossReduction(self.objective)
        return self._training_loss

    @property
    def validation_loss_reduction(self) -> MegatronLossReduction:
        """The same loss, kept apart since it remembers its batch."""
        if self._validation_loss is None:
            self._validation_loss = NextTokenLossReduction(self.objective)
        return self._validation_loss


def _keep_text(dropout: float, draw_ids: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Float 0 or 1, [B]; depends on (seed, draw_id) alone, never on the rank."""
    # Not torch's CPU generator: it keeps 32 bits of its seed, too few for a pair of keys.
    drawn = [np.random.Generator(np.random.Philox(key=[seed, key])).random() for key in draw_ids.tolist()]
    return (torch.tensor(drawn) >= dropout).float()
