"""Starting a diffusion decoder from a diffusion WFM, which knows what latents look like, or from another decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from nemo_cosmos.autoregressive.diffusion_decoder.model import DiffusionDecoderDiT
from nemo_cosmos.diffusion.warm_start import copy_whole_weights
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.parallel.stored_weights import PREFIX, is_nemo, read_whole_tensors, stored_shapes, weights_folder
from nemo_cosmos.weight_files.hub import local_path

_PATCHES = "x_embedder.proj.weight"
TOKEN_LAYERS = ("token_embedder.",)
"""Prefix of what a WFM lacks; it keeps its first values, by which the tokens begin without effect."""


def load_wfm(network: DiffusionDecoderDiT, base: str | Path) -> None:
    """Copies this rank's share of a WFM's whole weights, or of a decoder's as they are, one weight at a time.

    Of a WFM, the patch embedding takes the columns of the latent and of the padding mask; those of the tokens keep
    their first values, and that of a condition mask, which is zero where no frame is given, is left behind. So the
    network computes what the WFM does without given frames, until training has moved the tokens' embedding away from
    zero.

    Args:
        network: This rank's part of the decoder.
        base: A safetensors file of whole weights under our names, or its address on the hub; or a NeMo checkpoint, of
            which averaged weights are taken where it has them.

    Raises:
        UserError: It is neither, or a weight is missing or of another shape.
    """
    place = local_path(base)
    names, read = _open(place)
    first = dict(network.global_tensors())

    def read_for_decoder(name: str) -> torch.Tensor:
        whole = read(name)
        is_wfm = name == _PATCHES and whole.shape != first[name].shape
        return _with_token_columns(whole, first[name], network) if is_wfm else whole

    copy_whole_weights(network, names, read_for_decoder, source=str(place), may_lack=TOKEN_LAYERS)


def _open(place: Path) -> tuple[Iterable[str], Callable[[str], torch.Tensor]]:
    if is_nemo(place):
        folder = weights_folder(place, use_ema=True)
        shapes = {
            name.removeprefix(PREFIX): shape for name, shape in stored_shapes(folder).items() if name.startswith(PREFIX)
        }

        def read(name: str) -> torch.Tensor:
            whole = torch.empty(shapes[name])
            read_whole_tensors({PREFIX + name: whole}, folder)
            return whole

        return shapes, read
    if not place.is_file():
        raise UserError(f"{place}: no such file or checkpoint. Give a .safetensors file, or a NeMo checkpoint.")
    file = safe_open(place, framework="pt")
    return file.keys(), file.get_tensor


@torch.no_grad()
def _with_token_columns(wfm_DP: torch.Tensor, own_DP: torch.Tensor, network: DiffusionDecoderDiT) -> torch.Tensor:
    """The decoder's patch embedding: inputs stand channel by channel, the latent's first and the padding mask last."""
    config = network.config
    latent, padding = (
        channels * config.patch_volume for channels in (config.in_channels, int(config.concat_padding_mask))
    )
    masks = wfm_DP.shape[1] - latent
    if wfm_DP.shape[0] != len(own_DP) or masks not in (padding, padding + config.patch_volume):
        raise user_error(
            _PATCHES,
            list(wfm_DP.shape),
            f"[{len(own_DP)}, {latent + padding}], or {config.patch_volume} columns more for a condition mask",
            "Give a WFM of the decoder's size, for the same latents.",
        )
    whole = own_DP.detach().clone()
    whole[:, :latent] = wfm_DP[:, :latent]
    if padding:
        whole[:, -padding:] = wfm_DP[:, -padding:]
    return whole
