"""Tokenizers as programs that run without this package: TorchScript, `torch.export` and ONNX.

Every file is read again and compared with the model, at another size than it was made with, before it appears.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.halves import Autoencoder, DecoderHalf, EncoderHalf, with_reference_buffers
from nemo_cosmos.tokenizer.model import Tokenizer
from nemo_cosmos.tokenizer.statistics import LatentStatistics, write_published

Program = Literal["torchscript", "torch_export", "onnx"]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Most that an output may be off, over its largest value, by the weights' dtype: other kernels sum in another order."""
MOST_OTHER_CODES = 1e-3
"""Most of a discrete latent's indices that may differ, where a number stands at the border of two levels."""
_CHECKED_CELLS = {False: (3, 2), True: (40, 26)}
"""Rows and columns of the latent that a file is checked at, by whether it is discrete: one in a thousand needs them."""

_ONNX_OPSET = 18


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One file to be."""

    name: str
    module: nn.Module
    example: Tensor
    """What it is traced with."""
    check: Tensor
    """What it is compared with: other batch, frames, height and width."""
    discrete: bool
    """Whether outputs are indices or their codes."""


def export(
    tokenizer: Tokenizer, folder: str | Path, *, to: Program, statistics: LatentStatistics | None = None
) -> Path:
    """Writes a tokenizer's encoder and decoder as programs.

    Args:
        tokenizer: In the dtype that the files shall have.
        folder: Where; an older one is replaced. It gets `config.json` beside them.
        to: `torchscript` writes `encoder.jit`, `decoder.jit` and `autoencoder.jit` with the published names, inputs and
            outputs; `torch_export` `encoder.pt2` and `decoder.pt2`, the same but for the names of constants; `onnx`
            `encoder.onnx` and `decoder.onnx`, whose outputs are `latent`, or `indices` and `codes`, and
            `reconstruction`. Batch, frames, height and width may change; those of `torch_export` not below two cells of
            the latent, for it takes sizes of one for constants.
        statistics: Of the latents; `torchscript` has a place for them, as the published folders have.

    Returns:
        The folder.

    Raises:
        UserError: A package is missing, the dtype has no ONNX kernels, or a file does not give what the model gives.
    """
    folder = Path(folder)
    if to == "onnx":
        _check_onnx(tokenizer)
    if to == "torchscript":
        tokenizer = with_reference_buffers(tokenizer)
    write = {"torchscript": _write_torchscript, "torch_export": _write_torch_export, "onnx": _write_onnx}[to]
    with torch.no_grad(), written_aside(folder) as aside:
        aside.mkdir()
        for part in _parts(tokenizer, to):
            run = write(part, aside, tokenizer.tokenizer_config)
            _compare(f"{folder.name}/{part.name}", run(part.check), part)
        write_json(aside / "config.json", tokenizer.tokenizer_config.to_dict())
        if to == "torchscript" and statistics is not None:
            write_published(aside, statistics, tokenizer.tokenizer_config.latent_channels)
    return folder


def _parts(tokenizer: Tokenizer, to: Program) -> Iterator[_Part]:
    config = tokenizer.tokenizer_config
    dtype = next(tokenizer.parameters()).dtype
    # Sizes of 1 are not traced with, because tracers take them for constants.
    check_latent_frames = 2 if to == "torch_export" else 1
    discrete = config.levels is not None
    sizes = {"example": (2, 3, 2, 3), "check": (1, check_latent_frames, *_CHECKED_CELLS[discrete])}
    pictures = {name: _picture(config, *size).to(dtype) for name, size in sizes.items()}
    encoder: nn.Module = EncoderHalf(tokenizer).eval()
    if to == "onnx":
        encoder = _FirstOutputs(encoder, 2 if discrete else 1)
    yield _Part(name="encoder", module=encoder, **pictures, discrete=discrete)
    latents = {name: encoder(picture)[0] for name, picture in pictures.items()}
    yield _Part(name="decoder", module=DecoderHalf(tokenizer).eval(), **latents, discrete=False)
    if to == "torchscript":
        yield _Part(name="autoencoder", module=Autoencoder(tokenizer).eval(), **pictures, discrete=False)


def _picture(config: TokenizerConfig, batch_size: int, latent_frames: int, rows: int, columns: int) -> Tensor:
    """Noise in [-1, 1] of so many latent cells."""
    cell = config.spatial_compression
    frames = (1 + (latent_frames - 1) * config.temporal_compression,) if config.modality == "video" else ()
    shape = (batch_size, config.in_channels, *frames, rows * cell, columns * cell)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _write_torchscript(part: _Part, folder: Path, config: TokenizerConfig) -> Callable[[Tensor], Any]:
    path = str(folder / f"{part.name}.jit")
    with warnings.catch_warnings():
        # Sizes that become constants would show in the comparison.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.trace(part.module, part.example, check_trace=False).save(path)
    return torch.jit.load(path)


def _write_torch_export(part: _Part, folder: Path, config: TokenizerConfig) -> Callable[[Tensor], Any]:
    path = str(folder / f"{part.name}.pt2")
    program = torch.export.export(part.module, (part.example,), dynamic_shapes=(_dynamic_axes(part, config),))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _dynamic_axes(part: _Part, config: TokenizerConfig) -> dict[int, Any]:
    """The input's axes that may change, and by which rule."""
    time, space = (config.temporal_compression, config.spatial_compression) if part.name == "encoder" else (1, 1)
    height, width = (torch.export.Dim(name, min=2) for name in ("rows", "columns"))
    axes: list[Any] = [torch.export.Dim("batch", min=1)]
    if config.modality == "video":
        chunks = torch.export.Dim("chunks", min=1)
        axes.append(time * chunks + 1)
    axes += [space * height, space * width] if space > 1 else [height, width]
    return dict(zip(_changing(part.example, config), axes, strict=True))


def _changing(latent_or_picture: Tensor, config: TokenizerConfig) -> list[int]:
    """Axes of batch, frames, height and width."""
    num_grid = 3 if config.modality == "video" else 2
    return [0, *range(latent_or_picture.ndim - num_grid, latent_or_picture.ndim)]


def _write_onnx(part: _Part, folder: Path, config: TokenizerConfig) -> Callable[[Tensor], Any]:
    import onnxruntime

    path = folder / f"{part.name}.onnx"
    latent = ["latent"] if config.levels is None else ["indices", "codes"]
    inputs, outputs = ([config.modality], latent) if part.name == "encoder" else (latent[:1], ["reconstruction"])
    axes = ("batch", *(("frames",) if config.modality == "video" else ()), "height", "width")
    tensors = dict(zip((*inputs, *outputs), (part.example, *_flat(part.module(part.example))), strict=True))
    with warnings.catch_warnings():
        # The tracer's are as for TorchScript; the other says that a newer exporter exists, which needs onnxscript.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            part.module,
            (part.example,),
            path,
            dynamo=False,
            opset_version=_ONNX_OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={
                name: {axis: f"{name}_{word}" for axis, word in zip(_changing(tensor, config), axes, strict=True)}
                for name, tensor in tensors.items()
            },
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: tuple(torch.from_numpy(y) for y in session.run(None, {inputs[0]: x.numpy()}))


class _FirstOutputs(nn.Module):
    """A part without the outputs that are always zero.

    Args:
        module: The part.
        num_outputs: How many are kept.
    """

    def __init__(self, module: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.module, self.num_outputs = module, num_outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As the part."""
        return tuple(_flat(self.module(x)))[: self.num_outputs]


def _check_onnx(tokenizer: Tokenizer) -> None:
    lacking = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--to onnx: {lacking} cannot be imported. Install them, or choose another format.")
    dtype = next(tokenizer.parameters()).dtype
    if dtype != torch.float32:
        raise user_error("--to onnx", dtype, "float32 weights", "Give --dtype float32.")


def _compare(what: str, found: Any, part: _Part) -> None:  # noqa: ANN401 - a tensor or nested tuples
    """Refuses a program whose outputs are not the model's."""
    most_off = MOST_OTHER_CODES if part.discrete else 0.0
    outputs, model_outputs = list(_flat(found)), list(_flat(part.module(part.check)))
    if len(outputs) != len(model_outputs):
        number = f"{len(model_outputs)}, as the model gives"
        raise user_error(f"{what}: outputs", len(outputs), number, "This is a defect of the export.")
    for got, expected in zip(outputs, model_outputs, strict=True):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            got_form, form = ((tuple(tensor.shape), tensor.dtype) for tensor in (got, expected))
            raise user_error(what, got_form, f"{form}, as the model gives", "This is a defect of the export.")
        largest = TOLERANCE.get(expected.dtype, 0.0) * expected.abs().max()
        # Written so that a NaN counts as off.
        share_off = 1 - ((got - expected).abs() <= largest).float().mean().item()
        if share_off > most_off:
            raise user_error(
                what,
                f"outputs of which {share_off:.2%} differ from the model",
                f"at most {most_off:.2%}",
                "Report it with the versions of torch and onnxruntime, or choose another format.",
            )


def _flat(outputs: Any) -> Iterator[Tensor]:  # noqa: ANN401 - a tensor or nested tuples
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from _flat(output)
