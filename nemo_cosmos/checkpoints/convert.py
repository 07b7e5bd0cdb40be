"""One entry point for all conversions; values are moved, and cast only when asked."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_cosmos import __version__
from nemo_cosmos.autoregressive.config import PRESETS as AR_PRESETS
from nemo_cosmos.autoregressive.diffusion_decoder.config import PRESETS as DECODER_PRESETS
from nemo_cosmos.checkpoints import nemo_format
from nemo_cosmos.checkpoints.autoregressive import AUTOREGRESSIVE, convert_autoregressive
from nemo_cosmos.checkpoints.convert_wfm import convert_wfm
from nemo_cosmos.checkpoints.detect import Format, detect
from nemo_cosmos.checkpoints.diffusion_decoder import DIFFUSION_DECODER, convert_diffusion_decoder
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.checkpoints.latents import told
from nemo_cosmos.checkpoints.wfm import is_wfm
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.config import PRESETS as DIT_PRESETS
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import read_json, write_json, written_aside
from nemo_cosmos.parallel.stored_weights import PREFIX, is_nemo
from nemo_cosmos.tokenizer import conversion, published
from nemo_cosmos.tokenizer import state_dict as tokenizer_names
from nemo_cosmos.tokenizer import weights as tokenizer_weights
from nemo_cosmos.tokenizer.config import PRESETS as TOKENIZER_PRESETS
from nemo_cosmos.tokenizer.config import RELEASED, TokenizerConfig
from nemo_cosmos.tokenizer.export import Program, export
from nemo_cosmos.tokenizer.model import Tokenizer, build_tokenizer
from nemo_cosmos.tokenizer.statistics import IMAGE_FILE, VIDEO_FILE, LatentStatistics, of_diffusers, read_published
from nemo_cosmos.tokenizer.weights import read_tensors, write_tensors
from nemo_cosmos.weight_files.stored_tensor import read_all, stored

Target = Literal["nemo", "diffusers", "reference", "safetensors", "folder", "torchscript", "torch_export", "onnx"]
Dtype = Literal["float32", "bfloat16", "float16"]

TOKENIZERS = TOKENIZER_PRESETS | {name: TOKENIZER_PRESETS[preset] for name, preset in RELEASED.items()}
"""Architectures of tokenizers by the names of presets and of published repositories."""

_FILES: dict[str, tuple[str, ...]] = {"reference": (".pt", ".safetensors"), "safetensors": (".safetensors",)}
"""Suffixes of the targets that are files."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)|\.index\.json$")
"""What tells a file of weights that was cut into several, and their index, from a whole one."""

_FOLDERS = (
    {"weights", "card.json"},
    {conversion.DIFFUSERS_WEIGHTS, "config.json"},
    {tokenizer_weights.WEIGHTS_FILE, tokenizer_weights.CONFIG_FILE},
    {"encoder.jit", "decoder.jit", "autoencoder.jit", "config.json"},
    {"encoder.pt2", "decoder.pt2", "config.json"},
    {"encoder.onnx", "decoder.onnx", "config.json"},
)
"""All that stands in a folder that a conversion wrote; beside `encoder.jit` statistics may stand, too."""


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """A tokenizer between two formats: whole weights under our names, and its card."""

    weights: dict[str, torch.Tensor]
    card: CheckpointCard


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Target,
    preset: str | None = None,
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
) -> dict[str, Any]:
    """Converts a tokenizer or a WFM.

    Args:
        source: NeMo checkpoint, diffusers folder (of a pipeline its transformer is taken), tokenizer folder,
            `.safetensors` with a card beside it, published folder (`model.pt`; of tokenizers also `encoder.jit` and
            `decoder.jit`, or `autoencoder.jit`), reference `.jit`, `.pt` or `.safetensors`, the name of embedded
            weights, or `hf://OWNER/NAME[@REVISION][/PATH]` on the Hugging Face hub.
        target: A file for `reference` (.pt, .safetensors) and `safetensors` (whole weights under our names with a card
            beside them, as embedded ones), a folder for all others. A file, or a folder that an earlier conversion
            wrote, is replaced.
        to: The format to write; `folder`, `torchscript`, `torch_export` and `onnx` take tokenizers alone, and the last
            three write programs that run without this package (`nemo_cosmos.tokenizer.export`).
        preset: The architecture of published and reference weights: a name such as `diffusion_7b`, `autoregressive_4b`
            or `CV8x8x8-720p`, or a tokenizer's published name such as `Cosmos-Tokenize1-CV8x8x8-720p`. Needed where
            neither the folder's name nor a `config.json` tells it, nor a card beside the file, nor, of a published WFM,
            the shapes.
        dtype: Store floating-point weights so; None leaves them as they are, bit for bit.
        tokenizer: The tokenizer whose latents or codes a WFM was trained on, for its card; anything `load_tokenizer`
            takes.
        statistics: JSON with the latents' `latent_mean` and `latent_std`, for a diffusion WFM's card; those that the
            tokenizer given comes with when absent.

    Returns:
        What was converted: kind, number of weights and of parameters, what the target cannot hold (`dropped`), and what
        the target got anew, since the source could not hold it (`added`).

    Raises:
        UserError: The source is unknown or damaged, the target cannot hold the model, or replacing it would delete the
            source or other files than those of a conversion.
    """
    if to not in get_args(Target):
        raise user_error("--to", to, f"one of {get_args(Target)}", "Choose one of them.")
    if dtype not in (None, *get_args(Dtype)):
        raise user_error("--dtype", dtype, f"one of {get_args(Dtype)}", "Choose one of them, or leave it out.")
    cast_to = None if dtype is None else getattr(torch, dtype)
    place = find_checkpoint(source)
    _check_target(place, Path(target), to)
    if AUTOREGRESSIVE.lies_at(place, preset):
        if statistics is not None:
            raise user_error("--statistics", str(statistics), "none, for codes have none", "Leave them out.")
        written = convert_autoregressive(place, Path(target), to=to, preset=preset, dtype=cast_to, tokenizer=tokenizer)
        parameters = sum(weight.shape.numel() for weight in written.values())
        return _report("autoregressive", len(written), parameters, target, (), ())
    facts = {"tokenizer": tokenizer, "statistics": statistics}
    if DIFFUSION_DECODER.lies_at(place, preset):
        written = convert_diffusion_decoder(place, Path(target), to=to, preset=preset, dtype=cast_to, **facts)
        parameters = sum(weight.shape.numel() for weight in written.values())
        return _report("diffusion_decoder", len(written), parameters, target, (), ())
    if is_wfm(place, preset):
        wfm = convert_wfm(place, Path(target), to=to, preset=preset, dtype=cast_to, **facts)
        parameters = sum(weight.shape.numel() for weight in wfm.weights.values())
        return _report("diffusion", len(wfm.weights), parameters, target, wfm.dropped, wfm.added)
    if (tokenizer, statistics) != (None, None):
        raise user_error("--tokenizer, --statistics", "a tokenizer", "a WFM", "Leave them out.")
    model = _read(place, preset)
    tokenizer_weights.check(TokenizerConfig.from_dict(model.card.config), model.weights)
    if cast_to is not None:
        model = _cast(model, cast_to)
    dropped = tuple(_write(model, Path(target), to))
    parameters = sum(tensor.numel() for tensor in model.weights.values())
    return _report("tokenizer", len(model.weights), parameters, target, dropped, ())


def _report(
    kind: str,
    weights: int,
    parameters: int,
    target: str | Path,
    dropped: tuple[str, ...],
    added: tuple[str, ...],
) -> dict[str, Any]:
    return {
        "kind": kind,
        "weights": weights,
        "parameters": parameters,
        "dropped": list(dropped),
        "added": list(added),
        "target": str(target),
    }


def _check_target(source: Path, target: Path, to: Target) -> None:
    """Refuses a target of another form than the format, and one whose replacement would delete what must stay."""
    suffixes = _FILES.get(to)
    if suffixes is not None and target.suffix not in suffixes:
        raise user_error("target", target.name, f"a {' or '.join(suffixes)} file", "Name a file.")
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise user_error("target", str(target), f"a place apart from the source {source}", "Give another target.")
    if not target.exists():
        return
    way_out = "Give another target, or delete this one."
    if target.is_dir() != (suffixes is None):
        raise user_error("target", str(target), f"a {'folder' if suffixes is None else 'file'}", way_out)
    if target.is_dir() and not _is_replaceable(target):
        raise user_error("target", str(target), "a new folder, or one that convert wrote", way_out)


def _is_replaceable(folder: Path) -> bool:
    found = {_SHARD.sub("", path.name) for path in folder.iterdir()}
    if "encoder.jit" in found:
        found -= {VIDEO_FILE, IMAGE_FILE}
    return not found or (found in _FOLDERS and ("weights" not in found or is_nemo(folder)))


def _write(model: WholeModel, target: Path, to: Target) -> list[str]:
    """Writes a model and returns what the format cannot hold."""
    if to == "diffusers":
        return _write_diffusers(model, target)
    if to == "reference":
        return _write_reference(model, target)
    if to == "folder":
        return _write_folder(model, target)
    if to in get_args(Program):
        return _write_program(model, target, to)
    if to == "nemo":
        nemo_format.save(stored(model.weights), model.card, target, describe=lambda: _sharded(model.card))
    else:
        card = target.with_suffix(".json")
        with written_aside(target) as aside:
            write_tensors(aside, model.weights)
            # A kill before the new card stands leaves weights without a card, which nobody takes for others.
            card.unlink(missing_ok=True)
        write_json(card, model.card.to_dict())
    return []


def _sharded(card: CheckpointCard) -> ShardedStateDict:
    """What is saved of a tokenizer: every weight is whole."""
    with torch.device("meta"):
        network = build_tokenizer(TokenizerConfig.from_dict(card.config))
    return make_sharded_tensors_for_checkpoint(network.state_dict(keep_vars=True), PREFIX)


def _cast(model: WholeModel, dtype: torch.dtype) -> WholeModel:
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in model.weights.items()}
    return dataclasses.replace(model, weights=weights)


def _read(place: Path, preset: str | None) -> WholeModel:
    found = detect(place)
    if found is Format.NEMO:
        card = CheckpointCard.from_dict(read_json(place / "card.json"))
        return WholeModel(weights=read_all(nemo_format.open_weights(place)), card=card)
    if found is Format.DIFFUSERS:
        return _read_diffusers(place)
    if found is Format.FOLDER:
        config = TokenizerConfig.from_dict(read_json(place / "config.json"))
        return _tokenizer(read_tensors(place / "model.safetensors"), config, place)
    if found is Format.PUBLISHED:
        return _read_published(place, preset)
    card_path = place.with_suffix(".json")
    if preset is None and place.suffix == ".safetensors" and card_path.exists():
        card = CheckpointCard.from_dict(read_json(card_path))
        return WholeModel(weights=read_tensors(place), card=card)
    return _read_reference(place, preset)


def _read_diffusers(folder: Path) -> WholeModel:
    values, weights = read_json(folder / "config.json"), conversion.read_diffusers_weights(folder)
    config = conversion.config_of_diffusers(values)
    model = _tokenizer(tokenizer_names.from_diffusers_names(weights, config), config, folder)
    statistics = of_diffusers(values, config.latent_channels)
    return dataclasses.replace(model, card=dataclasses.replace(model.card, **statistics.card_fields()))


def _read_published(folder: Path, preset: str | None) -> WholeModel:
    model = _read_reference(folder, preset)
    statistics = read_published(folder, TokenizerConfig.from_dict(model.card.config).latent_channels)
    return dataclasses.replace(model, card=dataclasses.replace(model.card, **statistics.card_fields()))


def _read_reference(place: Path, preset: str | None) -> WholeModel:
    """Reads weights under the reference's names: a file, or a published folder."""
    config = published.config_told_by(place) if preset is None else TOKENIZERS.get(preset.removeprefix("nvidia/"))
    if config is None:
        known = sorted(TOKENIZERS.keys() | DIT_PRESETS.keys() | AR_PRESETS.keys() | DECODER_PRESETS.keys())
        raise user_error("--preset", preset, f"one of {known}", "Reference weights do not tell their architecture.")
    weights = published.read_weights(place)
    return _tokenizer(tokenizer_names.from_reference_names(weights, config), config, place)


def _tokenizer(weights: dict[str, torch.Tensor], config: TokenizerConfig, source: Path) -> WholeModel:
    card = CheckpointCard(
        model="tokenizer",
        config=config.to_dict(),
        step=0,
        data="not known",
        command="nemo-cosmos convert",
        parent=str(source),
        versions={"nemo_cosmos": __version__},
    )
    return WholeModel(weights=weights, card=card)


def _write_diffusers(model: WholeModel, folder: Path) -> list[str]:
    tokenizer = TokenizerConfig.from_dict(model.card.config)
    conversion.save_diffusers(model.weights, tokenizer, folder, LatentStatistics.of_card(model.card))
    return told(model.card, ("image_latent_mean", "image_latent_std"))


def _write_reference(model: WholeModel, path: Path) -> list[str]:
    conversion.save_reference(model.weights, TokenizerConfig.from_dict(model.card.config), path)
    return told(model.card)


def _write_folder(model: WholeModel, folder: Path) -> list[str]:
    tokenizer_weights.save(_built(model), folder)
    return told(model.card)


def _write_program(model: WholeModel, folder: Path, to: Program) -> list[str]:
    statistics = LatentStatistics.of_card(model.card)
    export(_built(model), folder, to=to, statistics=statistics)
    kept = statistics.card_fields() if to == "torchscript" else {}
    return [name for name in told(model.card) if name not in kept]


def _built(model: WholeModel) -> Tokenizer:
    dtypes = {weight.dtype for weight in model.weights.values()}
    if len(dtypes) != 1:
        raise user_error("weights", sorted(map(str, dtypes)), "one dtype", "Choose it: --dtype.")
    config = TokenizerConfig.from_dict(model.card.config)
    return tokenizer_weights.build(config, model.weights, dtype=dtypes.pop())
