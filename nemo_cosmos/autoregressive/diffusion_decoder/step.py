"""The diffusion decoder as a NeMo Lightning module: what one training step does."""

from __future__ import annotations

from typing import Any

from nemo_cosmos.autoregressive.diffusion_decoder.architecture import architecture_of
from nemo_cosmos.autoregressive.diffusion_decoder.config import DiffusionDecoderConfig
from nemo_cosmos.autoregressive.diffusion_decoder.model import HIDDEN_TOKEN, DiffusionDecoderDiT
from nemo_cosmos.autoregressive.diffusion_decoder.warm_start import load_wfm
from nemo_cosmos.contracts import LatentCacheCard
from nemo_cosmos.diffusion.conditioning import Draws
from nemo_cosmos.diffusion.step import Batch, DiffusionModel
from nemo_cosmos.errors import user_error


class DiffusionDecoderModel(DiffusionModel):
    """A diffusion decoder under the EDM objective; arguments are those of `DiffusionModel`.

    `conditioning.condition_dropout` is the probability of hiding a sample's tokens, for guidance. `init_from` is a
    Text2World or Video2World diffusion WFM, a safetensors file or a checkpoint; see `load_wfm`.
    """

    network_class = DiffusionDecoderDiT
    config: DiffusionDecoderConfig

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
        super().check_data(*(card for card in cards if card.continuous), with_actions=with_actions)

    def conditions(self, batch: Batch, draws: Draws) -> Batch:
        """The tokens, hidden where they are dropped."""
        tokens_BTHW = batch["tokens"]
        hidden = draws.keep_frames.view(-1, 1, 1, 1) == 0
        return {"tokens": tokens_BTHW.masked_fill(hidden.to(tokens_BTHW.device), HIDDEN_TOKEN)}

    def network_arguments(self, batch: Batch) -> dict[str, Any]:
        """Of the network's forward, besides latent, time and text."""
        return {"fps": batch["fps"], "tokens_BTHW": batch["tokens"]}
