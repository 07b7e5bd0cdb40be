"""The diffusion WFM as a NeMo Lightning module: what one training step does."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device
from megatron.core.optimizer import OptimizerConfig
from megatron.core.utils import get_attr_wrapped_model
from nemo.lightning import io
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import MegatronOptimizerModule, OptimizerModule
from torch import nn

from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.data.shuffle import pictures_one_by_one
from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.architecture import architecture_of
from nemo_cosmos.diffusion.conditioning import ConditioningConfig, Draws, condition_mask, draw, network_input
from nemo_cosmos.diffusion.config import DiTConfig, check_layout
from nemo_cosmos.diffusion.flops import training_flops
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.objective import EDM, per_sample, uncertainty_weighted_loss
from nemo_cosmos.diffusion.packing import check_packed_layout
from nemo_cosmos.diffusion.warm_start import ACTION_LAYERS, load_whole_weights
from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.device import current_device, on_device
from nemo_cosmos.parallel.fsdp import check_pieces
from nemo_cosmos.parallel.loss import MeanLossReduction
from nemo_cosmos.parallel.stages import stage_ends

Batch = dict[str, Any]
"""Tensors by name; lists of them, one clip each, for latents and masks of a pack."""


class DiffusionLossReduction(MeanLossReduction):
    """EDM loss of a micro-batch, from what `DiffusionModel.forward_step` gives on the last pipeline stage.

    Args:
        edm: Preconditioning and weights.
    """

    def __init__(self, edm: EDM) -> None:
        super().__init__()
        self._edm = edm

    def forward(self, batch: Batch, forward_out: dict[str, Any]) -> tuple[torch.Tensor, Batch]:
        """Denoises by the network's output and compares with the clean latent.

        Samples count by their sizes: alike in a batch of one size, and so that every latent value counts alike in a
        pack.
        """
        names = ("noisy", "clean", "free")
        outputs, *latents = (_as_list(x) for x in (forward_out["network_output"], *(batch[name] for name in names)))
        sizes = [len(output) for output in outputs]
        per_part = zip(outputs, *latents, batch["sigma"].split(sizes), forward_out["logvar"].split(sizes), strict=True)
        losses, errors = zip(*(self._per_sample(*part) for part in per_part), strict=True)
        loss_B, error_B = torch.cat(losses), torch.cat(errors)
        values = [x[0].numel() for x in outputs for _ in range(len(x))]
        share_B = torch.tensor(values, dtype=torch.float64)
        share_B = on_device(share_B / share_B.mean(), loss_B.device, torch.float32)
        loss = (share_B * loss_B).mean()
        # Cloned, because Megatron scales the loss in place.
        return loss, {"avg": loss.detach().clone().view(1), "error": (share_B * error_B.detach()).mean().view(1)}

    def _per_sample(
        self,
        output: torch.Tensor,
        noisy: torch.Tensor,
        clean: torch.Tensor,
        free: torch.Tensor,
        sigma_B: torch.Tensor,
        logvar_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        denoised = self._edm.denoised(noisy, output, sigma_B)
        return uncertainty_weighted_loss(denoised, clean, self._edm.loss_weight(sigma_B), logvar_B.float(), free)


def _as_list(latents: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return latents if isinstance(latents, list) else [latents]


class DiffusionModel(pl.LightningModule, io.IOMixin, io.ConnectorMixin):
    """A Cosmos diffusion WFM under the EDM objective.

    Args:
        config: The network.
        edm: Noise law and preconditioning.
        conditioning: Text dropout and given frames.
        optim: Optimizer; AdamW with the published values when absent.
        init_from: Safetensors file of whole weights to start from; None starts anew. A base model without action
            layers may start one that has them.
        seed: Of all random draws; see `conditioning.draw`.

    Raises:
        UserError: Frames are to be given to a network that has no channel to tell them by.
    """

    network_class: type[CosmosDiT] = CosmosDiT
    """What is trained."""

    def __init__(
        self,
        config: DiTConfig,
        *,
        edm: EDM | None = None,
        conditioning: ConditioningConfig | None = None,
        optim: OptimizerModule | None = None,
        init_from: str | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.config = config
        self.edm = edm or EDM()
        self.conditioning = conditioning or ConditioningConfig()
        if self.conditioning.max_condition_frames and not config.concat_condition_mask:
            raise user_error(
                "max_condition_frames",
                self.conditioning.max_condition_frames,
                "0, for the network has concat_condition_mask off",
                "Set concat_condition_mask in the model's configuration, or give no frames.",
            )
        self.init_from = init_from
        self.seed = seed
        self.optim = optim or MegatronOptimizerModule(
            config=OptimizerConfig(lr=2**-14.3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.99, bf16=config.bf16)
        )
        self.optim.connect(self)
        self._work = (0, 0)
        self._training_loss: DiffusionLossReduction | None = None
        self._validation_loss: DiffusionLossReduction | None = None

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the model."""
        size = f"{self.config.num_layers}x{self.config.hidden_size}"
        kind = "video2world" if self.conditioning.max_condition_frames else "text2world"
        kind = kind if self.config.action_dim is None else "action"
        return {"model": f"diffusion_{size}_{kind}", "config": architecture_of(self.config)}

    def check_data(self, *cards: LatentCacheCard, is_packed: bool = False, with_actions: bool | None = None) -> None:
        """Refuses latents that the network cannot take in its layout; the strategy calls it before anything is built.

        Args:
            *cards: Of the latent caches that are trained on.
            is_packed: Whether samples are packed into one sequence.
            with_actions: Whether samples carry actions; None where it is not known.

        Raises:
            UserError: Channels, size or text width differ from the model's, the ranks cannot share the tokens, all
                frames would be given, or samples lack the actions that the network takes, or have some that it does not
                take.
        """
        config = self.config
        if is_packed:
            self._check_packs()
        if with_actions not in (None, config.action_dim is not None):
            raise user_error(
                "with_actions of the data",
                with_actions,
                f"{not with_actions}, for the model has action_dim {config.action_dim}",
                "Change one of the two.",
            )
        for card in cards:
            self._check_cache(card, is_packed=is_packed)

    def _check_packs(self) -> None:
        if self.config.action_dim is not None:
            raise user_error("actions in packs", "action_dim set", "None", "Train on batches of one size.")
        check_packed_layout(self.config)

    def _check_condition_frames(self, num_latent_frames: int) -> None:
        """Refuses samples of which all frames may be given; pictures are given none."""
        most = self.conditioning.max_condition_frames
        if 1 < num_latent_frames <= most:
            raise user_error(
                "max_condition_frames",
                most,
                f"fewer than the {num_latent_frames} latent frames of a sample",
                "Lower it in the conditioning, or train on longer videos.",
            )

    def _check_cache(self, card: LatentCacheCard, *, is_packed: bool) -> None:
        config, (channels, *size) = self.config, card.latent_shape
        if not card.continuous or channels != config.in_channels:
            raise user_error(
                "latent_shape of the cache",
                card.latent_shape,
                f"[{config.in_channels}, T, H, W], for the model has in_channels {config.in_channels}",
                "Tokenize with the tokenizer that the model is made for.",
            )
        if card.text_dim != config.crossattn_emb_channels:
            raise user_error(
                "text_dim of the cache",
                card.text_dim,
                f"{config.crossattn_emb_channels}, the model's crossattn_emb_channels",
                "Tokenize with the text encoder that the model is made for, or change the model.",
            )
        led_to = (size[0] - 1) * config.action_frames_per_latent
        if config.action_dim is not None and card.num_frames - 1 != led_to:
            raise user_error(
                "action_frames_per_latent",
                config.action_frames_per_latent,
                f"the {card.num_frames} frames of a sample to be one and as many for each further latent frame",
                "Set it to the tokenizer's temporal compression.",
            )
        num_tokens = math.prod(config.token_grid(tuple(size)))
        self._check_condition_frames(size[0])
        check_layout(
            config,
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            # Of images the ranks share the samples, but not in packs.
            config.context_parallel_size if size[0] > 1 or is_packed else 1,
            num_tokens,
        )

    def check_fsdp(self) -> None:
        """Refuses ranks that cannot share the weights evenly; the strategy calls it before anything is built.

        Raises:
            UserError: A weight cannot be cut into so many pieces.
        """
        config = copy.copy(self.config)
        config.backend = "torch"  # TransformerEngine's layers, of the same shapes, would take memory on "meta" too
        with torch.device("meta"):
            network = self.network_class(config)
        check_pieces(network, network.groups.dp_cp.size())

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's share of the network, once the process groups are there."""
        if not hasattr(self, "module"):
            if self.config.virtual_pipeline_model_parallel_size is not None:
                vp_stage = vp_stage or 0  # Lightning builds the first chunk and knows of no others.
            self.module: nn.Module = self.network_class(self.config, vp_stage=vp_stage, **stage_ends(vp_stage))
            if self.init_from is not None:
                self.load_base(self.init_from)

    def load_base(self, base: str) -> None:
        """Fills the network, once it is built, with the weights that it starts from."""
        load_whole_weights(self.module, base, may_lack=ACTION_LAYERS)

    def reinit(self) -> DiffusionModel:
        """Gives a module for a further chunk of an interleaved pipeline; called by NeMo.

        NeMo's own way would build the configuration anew from its arguments, without the layout that the strategy has
        put into it since.
        """
        return type(self)(
            self.config,
            edm=self.edm,
            conditioning=self.conditioning,
            init_from=self.init_from,
            seed=self.seed,
        )

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - hands on to the network
        """The network; see `CosmosDiT.forward`."""
        return self.module(*args, **kwargs)

    def data_step(self, dataloader_iter: Iterator[Any]) -> Batch:
        """Takes the next batch and makes the network's input from it; the same on every pipeline stage."""
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch
        made = self.noised_pack(batch["clips"]) if "clips" in batch else self.noised(batch)
        self._count(made)
        # The rates stay: the network reads them as plain numbers, for which it would wait for the device.
        return {**move_data_to_device(made, current_device()), "fps": made["fps"]}

    def take_work(self) -> tuple[int, int]:
        """Gives the tokens and the floating-point operations of the batches since the last call, and forgets them.

        Those of this data-parallel rank, over all ranks that share its batches.
        """
        work, self._work = self._work, (0, 0)
        return work

    def _count(self, batch: Batch) -> None:
        tokens, flops = self._work
        for clean in _as_list(batch["clean"]):
            _, _, *size = clean.shape
            tokens += len(clean) * math.prod(self.config.token_grid(tuple(size)))
            text_length = batch["text_emb"].shape[1]
            flops += training_flops(self.config, tuple(size), text_length=text_length, num_samples=len(clean))
        self._work = (tokens, flops)

    def noised_pack(self, clips: list[Batch]) -> Batch:
        """Draws noise for clips of different sizes that are packed into one sequence.

        Args:
            clips: What `noised` takes, each a batch of one.

        Returns:
            As `noised`; latents and masks are lists of one clip each.

        Raises:
            UserError: As `noised`; or the network takes no packs.
        """
        self._check_packs()
        made = [self.noised(clip) for clip in clips]
        joined = ("sigma", "c_noise", "text_emb", "fps")
        return {
            name: torch.cat([one[name] for one in made]) if name in joined else [one[name] for one in made]
            for name in made[0]
        }

    def noised(self, batch: Batch) -> Batch:
        """Draws noise for a batch of `LatentDataset` items.

        Args:
            batch: `latent` (normalised, B C T H W; or B N C 1 H W, samples of N pictures), `text_emb`, `fps`,
                `draw_id`, and `actions` where the network takes them.

        Returns:
            The network's inputs and the loss's targets.

        Raises:
            UserError: All latent frames may be given, which leaves none to learn from.
        """
        edm, config = self.edm, self.conditioning
        batch = pictures_one_by_one(batch) if batch["latent"].ndim == 6 else batch
        clean = batch["latent"] * edm.sigma_data
        is_picture = clean.shape[2] == 1
        self._check_condition_frames(clean.shape[2])
        draws = draw(config, clean.shape, batch["draw_id"], seed=self.seed)
        sigma = edm.sigma_of(draws.sigma_normal, clean.shape[2])
        noisy = clean + per_sample(sigma) * draws.noise
        num_given = draws.num_condition_frames
        given = condition_mask(torch.zeros_like(num_given) if is_picture else num_given, clean.shape)
        shown = given * per_sample(draws.keep_frames)
        scaled = network_input(edm, noisy, sigma, clean, given, draws.augment_noise, draws.augment_sigma)
        made = {
            "clean": clean,
            "noisy": noisy,
            "sigma": sigma,
            "c_noise": edm.c_noise(sigma),
            "condition_mask": shown,
            "free": 1 - given,
            "network_input": scaled.masked_fill(given != shown, 0.0),
            "text_emb": batch["text_emb"] * draws.keep_text.view(-1, 1, 1),
            "fps": batch["fps"],
        }
        return {**made, **self.conditions(batch, draws)}

    def conditions(self, batch: Batch, draws: Draws) -> Batch:
        """What the network is given besides latent, time, text and frames: actions, where it takes them.

        Args:
            batch: As for `noised`.
            draws: What is dropped.
        """
        if self.config.action_dim is None:
            return {}
        grouped = actions_per_latent_frame(batch["actions"], self.config.action_frames_per_latent)
        return {"actions": grouped * draws.keep_actions.view(-1, 1, 1)}

    def forward_step(self, batch: Batch) -> torch.Tensor | dict[str, torch.Tensor]:
        """Runs the network; on the last pipeline stage also its uncertainty head."""
        output = self.forward(
            batch["network_input"], batch["c_noise"], batch["text_emb"], **self.network_arguments(batch)
        )
        if not get_attr_wrapped_model(self.module, "post_process"):
            return output
        return {"network_output": output, "logvar": get_attr_wrapped_model(self.module, "logvar")(batch["c_noise"])}

    def network_arguments(self, batch: Batch) -> dict[str, Any]:
        """Of the network's forward, besides latent, time and text."""
        return {
            "fps": batch["fps"],
            "condition_mask_B1THW": batch["condition_mask"] if self.config.concat_condition_mask else None,
            "actions_BTA": batch.get("actions"),
        }

    def training_step(self, batch: Batch, batch_idx: int | None = None) -> Any:  # noqa: ANN401 - see forward_step
        """Lightning's name for `forward_step`."""
        return self.forward_step(batch)

    def validation_step(self, batch: Batch, batch_idx: int | None = None) -> Any:  # noqa: ANN401 - see forward_step
        """Lightning's name for `forward_step`."""
        return self.forward_step(batch)

    def make_loss_reduction(self) -> DiffusionLossReduction:
        """The loss, as Megatron's schedules want it."""
        return DiffusionLossReduction(self.edm)

    @property
    def training_loss_reduction(self) -> MegatronLossReduction:
        """The loss of training."""
        if self._training_loss is None:
            self._training_loss = self.make_loss_reduction()
        return self._training_loss

    @property
    def validation_loss_reduction(self) -> MegatronLossReduction:
        """The same loss, kept apart since it remembers its batch."""
        if self._validation_loss is None:
            self._validation_loss = self.make_loss_reduction()
        return self._validation_loss
