"""Names of the tokenizer's weights here, in the reference and in diffusers.

Ours are the reference's own names, for every family, so only the reference's constants differ (wavelets, codebook): we
compute them. `DIFFUSERS_RULES` is the one home of diffusers' names. Values are never touched, so every way there and
back is bit-exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import build_tokenizer
from nemo_cosmos.tokenizer.quantizer import FSQuantizer

DIFFUSERS_RULES: tuple[tuple[str, str], ...] = (
    # where: levels, blocks, resamplers
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.downsample\.", r".downsamplers.0."),
    (r"\.upsample\.", r".upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.attn_1\.0\.", r".mid_block.attentions.0."),
    (r"\.mid\.attn_1\.1\.", r".mid_block.temp_attentions.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    # what: the convolutions
    (r"\.([qkv])\.conv3d\.", r".to_\1."),
    (r"\.proj_out\.conv3d\.", r".to_out.0."),
    (r"\.nin_shortcut\.conv3d\.", r".conv_shortcut."),
    (r"\.0\.conv3d\.", r".conv_s."),
    (r"\.1\.conv3d\.", r".conv_t."),
    (r"(conv\d?)\.conv3d\.", r"\1."),
)
"""(our pattern, diffusers' form), applied in this order. Decoder levels count the other way and stand in code."""

_HAAR_TAP = 0.7071067811865476


def our_names(config: TokenizerConfig) -> list[str]:
    """Returns the names of all weights of a tokenizer, without allocating it."""
    with torch.device("meta"):
        return list(build_tokenizer(config).state_dict())


def check_in_diffusers(config: TokenizerConfig) -> None:
    """Refuses an architecture that diffusers has no class for.

    Raises:
        UserError: It is discrete, of images, or has another width before the latent than in it.
    """
    if config.family != "CV" or config.num_z_channels != config.latent_channels:
        got = f"{config.compression_name}, z_channels {config.num_z_channels}"
        expected = f"CV, z_channels {config.latent_channels}"
        raise user_error("architecture", got, expected, "diffusers has no class for others; choose another format.")


def diffusers_name(name: str, num_decoder_levels: int) -> str:
    """Returns diffusers' name of our weight `name` (`AutoencoderKLCosmos`)."""
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{num_decoder_levels - 1 - int(match[1])}.", name)
    for ours, theirs in DIFFUSERS_RULES:
        name = re.sub(ours, theirs, name)
    return name


def to_diffusers_names(weights: Mapping[str, Tensor], config: TokenizerConfig) -> dict[str, Tensor]:
    """Renames our weights for diffusers' `AutoencoderKLCosmos`.

    Raises:
        UserError: A weight is missing or unknown, the message names it; or diffusers has no such architecture.
    """
    check_in_diffusers(config)
    names = our_names(config)
    check_names("tokenizer weights", weights, names)
    return {diffusers_name(name, config.num_decoder_levels): weights[name] for name in names}


def from_diffusers_names(weights: Mapping[str, Tensor], config: TokenizerConfig) -> dict[str, Tensor]:
    """Renames the weights of diffusers' `AutoencoderKLCosmos` to ours.

    Raises:
        UserError: A weight is missing or unknown, the message names it; or diffusers has no such architecture.
    """
    check_in_diffusers(config)
    theirs = {diffusers_name(name, config.num_decoder_levels): name for name in our_names(config)}
    check_names("diffusers weights", weights, theirs)
    return {theirs[name]: weight for name, weight in weights.items()}


def reference_buffers(config: TokenizerConfig) -> dict[str, Tensor]:
    """Returns the constants that the reference stores with its weights.

    They are wavelet taps and their index, a video's patch size, and of a discrete tokenizer the levels, the base of the
    indices and the codebook (bfloat16). The 0.1 release stores none of them, and training with `persistent_quantizer`
    off not those of the quantizer.
    """
    is_video = config.modality == "video"
    tap = _HAAR_TAP if config.patch_method == "haar" else 1.0
    buffers = {}
    for patcher in (
        ("encoder.patcher3d", "decoder.unpatcher3d") if is_video else ("encoder.patcher", "decoder.unpatcher")
    ):
        buffers[f"{patcher}.wavelets"] = torch.tensor([tap, tap])
        buffers[f"{patcher}._arange"] = torch.arange(2)
    if is_video:
        buffers["encoder.patcher3d.patch_size_buffer"] = torch.tensor([config.patch_size], dtype=torch.int32)
    if config.levels is not None:
        quantizer = FSQuantizer(config.levels)
        codebook = quantizer.indices_to_codes(torch.arange(math.prod(config.levels)))
        buffers |= {f"quantizer.{name}": constant for name, constant in quantizer.named_buffers()}
        buffers["quantizer.implicit_codebook"] = codebook.bfloat16()
    return buffers


def names_never_run(config: TokenizerConfig) -> set[str]:
    """Returns the names of convolutions that the 0.1 and 1.0 code has in its video networks and never runs.

    There every level but the last holds all three convolutions of its resampler, whichever axes it resamples. The
    Tokenize1 code holds only those that run.
    """
    if config.modality == "image":
        return set()
    down = [f"encoder.down.{level}.downsample" for level in range(config.num_levels - 1)]
    up = [f"decoder.up.{level}.upsample" for level in range(1, config.num_decoder_levels)]
    convs = [f"{resampler}.conv{number}.conv3d" for resampler in (*down, *up) for number in (1, 2, 3)]
    return {f"{conv}.{part}" for conv in convs for part in ("weight", "bias")} - set(our_names(config))


def to_reference_names(weights: Mapping[str, Tensor], config: TokenizerConfig) -> dict[str, Tensor]:
    """Returns the reference's state dict: our weights and its constant buffers.

    Raises:
        UserError: A weight is missing or unknown; the message names it.
    """
    check_names("tokenizer weights", weights, our_names(config))
    return dict(weights) | reference_buffers(config)


def from_reference_names(weights: Mapping[str, Tensor], config: TokenizerConfig) -> dict[str, Tensor]:
    """Returns our weights out of the reference's state dict.

    It may or may not hold its constants (`reference_buffers`) and what older code never runs (`names_never_run`).

    Raises:
        UserError: A weight is missing or unknown, or a constant contradicts the config.
    """
    buffers = reference_buffers(config)
    for name in buffers.keys() & weights.keys():
        if weights[name].shape != buffers[name].shape or not torch.allclose(
            weights[name].double(), buffers[name].double(), atol=1e-3
        ):
            raise UserError(
                f"reference weights: {name} is {_start(weights[name])}, the config says {_start(buffers[name])}. "
                "Load them with the config they were trained with."
            )
    not_ours = buffers.keys() | names_never_run(config)
    kept = {name: weight for name, weight in weights.items() if name not in not_ours}
    check_names("reference weights", kept, our_names(config))
    return kept


def _start(constant: Tensor) -> list[float]:
    return constant.flatten()[:8].tolist()


def check_names(what: str, got: Iterable[str], expected: Iterable[str]) -> None:
    """Refuses a state dict whose names are not exactly the expected ones.

    Raises:
        UserError: Names every missing and every unknown weight.
    """
    got, expected = set(got), set(expected)
    if got != expected:
        raise UserError(
            f"{what}: missing {sorted(expected - got)}, unknown {sorted(got - expected)}. "
            "The file belongs to another architecture or is incomplete; choose the matching preset or config."
        )
