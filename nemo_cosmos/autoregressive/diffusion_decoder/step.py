"""The diffusion decoder as a NeMo Lightning module: what one training step does."""

from __future__ import annotations

from typing import Any

from nemo.lightning.pytorch.optim import OptimizerModule

from nemo_cosmos.autoregressive.diffusion_decoder.architecture import architecture_of
from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.model import HIDDEN_TOKEN, DiffusionDecoderDiT
from nemo_cosmos.autoregressive.diffusion_decoder.pixel_loss import SEEN, DecoderLossReduction, PixelLoss
from nemo_cosmos.autoregressive.diffusion_decoder.warm_start import load_wfm
from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.diffusion.conditioning import ConditioningConfig, Draws
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.step import Batch, DiffusionModel
from nemo_cosmos.errors import user_error


class DiffusionDecoderModel(DiffusionModel):
    """A diffusion decoder under the EDM objective.

    Args:
        config: The network.
        edm: Noise law and preconditioning.
        conditioning: Text dropout; `condition_dropout` is the probability of hiding a sample's tokens, for guidance.
        optim: As for `DiffusionModel`.
        init_from: A Text2World or Video2World diffusion WFM, or another decoder; see `load_wfm`.
        seed: Of all random draws.
        pixel_loss: Compares what is decoded from the estimates, besides; not in the published training.
    """

    network_class = DiffusionDecoderDiT
    config: DiffusionDecoderConfig

    def __init__(
        self,
        config: DiffusionDecoderConfig,
        *,
        edm: EDM | None = None,
        conditioning: ConditioningConfig | None = None,
        optim: OptimizerModule | None = None,
        init_from: str | None = None,
        seed: int = 1234,
        pixel_loss: PixelLoss | None = None,
    ) -> None:
        super().__init__(config, edm=edm, conditioning=conditioning, optim=optim, init_from=init_from, seed=seed)
        self.pixel_loss = pixel_loss

    def card_fields(self) -> dict[str, Any]:
        """What a checkpoint's card says of the model."""
        size = f"{self.config.num_layers}x{self.config.hidden_size}"
        return {"model": f"diffusion_decoder_{size}", "config": architecture_of(self.config)}

    def load_base(self, base: str) -> None:
        """Fills the network, once it is built, with the weights of a WFM."""
        load_wfm(self.module, base)

    def check_data(self, *cards: LatentCacheCard, is_packed: bool = False, with_actions: bool | None = None) -> None:
        """Refuses latents and tokens that the network cannot take in its layout.

        Args:
            *cards: Of the caches of latents and of tokens.
            is_packed: Whether samples are packed into one sequence; they cannot be.
            with_actions: Whether samples carry actions; they must not.

        Raises:
            UserError: There are no tokens, or they are of another vocabulary; samples are packed; or as
                `DiffusionModel.check_data`.
        """
        tokens = [card for card in cards if not card.continuous]
        if is_packed or not tokens:
            got = "packs" if is_packed else "no tokens"
            raise user_error("data", got, "latents and tokens of the same clips", "Use PairedLatentDataModule.")
        times = self.config.token_upsampling
        for card in tokens:
            expected = {(t, h // times, w // times) for _, t, h, w in (x.latent_shape for x in cards if x.continuous)}
            if {card.latent_shape} != expected:
                raise user_error(
                    "latent_shape of the tokens",
                    card.latent_shape,
                    f"{sorted(expected)}, for the model has token_upsampling {times}",
                    "Tokenize with the tokenizer that the model is made for, or change the model.",
                )
            if card.vocab_size != self.config.token_vocab_size:
                raise user_error(
                    "vocab_size of the tokens",
                    card.vocab_size,
                    f"{self.config.token_vocab_size}, the model's token_vocab_size",
                    "Tokenize with the tokenizer that the model is made for, or change the model.",
                )
        latents = [card for card in cards if card.continuous]
        super().check_data(*latents, with_actions=with_actions)
        for card in latents if self.pixel_loss is not None else ():
            self.pixel_loss.check_latents_of(card.tokenizer_fingerprint)

    def reinit(self) -> DiffusionDecoderModel:
        """As `DiffusionModel.reinit`."""
        made = super().reinit()
        made.pixel_loss = self.pixel_loss
        return made

    def conditions(self, batch: Batch, draws: Draws) -> Batch:
        """The tokens, hidden where they are dropped; and which samples are seen in pixels, none without tokens."""
        tokens_BTHW = batch["tokens"]
        hidden = draws.keep_frames.view(-1, 1, 1, 1) == 0
        made = {"tokens": tokens_BTHW.masked_fill(hidden.to(tokens_BTHW.device), HIDDEN_TOKEN)}
        if self.pixel_loss is not None:
            made[SEEN] = self.pixel_loss.drawn(batch["draw_id"].tolist(), self.seed) & draws.keep_frames.bool()
        return made

    def network_arguments(self, batch: Batch) -> dict[str, Any]:
        """Of the network's forward, besides latent, time and text."""
        return {"fps": batch["fps"], "tokens_BTHW": batch["tokens"]}

    def make_loss_reduction(self) -> DecoderLossReduction:
        """The EDM loss, and the pixel loss where there is one."""
        return DecoderLossReduction(self.edm, self.pixel_loss, lambda: self.trainer.datamodule.statistics)
