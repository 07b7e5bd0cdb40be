import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.tokenizer import export as export_module
from nemo_cosmos.tokenizer import published
from nemo_cosmos.tokenizer import state_dict as names
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.export import export
from nemo_cosmos.tokenizer.model import Tokenizer
from tests.unit.tokenizer.conftest import random_tokenizer
from tests.unit.tokenizer.test_published import DISCRETE, DISCRETE_IMAGE, FAMILIES, IMAGE, VIDEO

TOLERANCE = 1e-5
"""Programs run torch's own kernels; onnxruntime's sum in another order, for outputs of order 1."""


def picture_of(config: TokenizerConfig, *, chunks: int) -> Tensor:
    """A picture of a size that nothing was traced with."""
    frames = (1 + chunks * config.temporal_compression,) if config.modality == "video" else ()
    cell = config.spatial_compression
    shape = (3, config.in_channels, *frames, 5 * cell, 4 * cell)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda config: config.family)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A tokenizer and its TorchScript files."""
    tokenizer = random_tokenizer(request.param).requires_grad_(False)
    return tokenizer, export(tokenizer, tmp_path_factory.mktemp("export") / "folder", to="torchscript")


def load_jit(folder: Path, name: str) -> torch.jit.ScriptModule:
    return torch.jit.load(folder / f"{name}.jit")


@pytest.mark.parametrize("chunks", [0, 2])
def test_torchscript_has_the_published_interface(exported: tuple[Tokenizer, Path], chunks: int) -> None:
    tokenizer, folder = exported
    config = tokenizer.tokenizer_config
    picture = picture_of(config, chunks=chunks)
    latent = tokenizer.encode(picture)
    outputs = load_jit(folder, "encoder")(picture)
    assert torch.equal(outputs[0], latent)
    if config.levels is None:
        assert [moment.tolist() for moment in outputs[1]] == [[0.0], [0.0]]
    else:
        codes, loss = outputs[1:]
        assert outputs[0].dtype == torch.int32
        torch.testing.assert_close(codes, tokenizer.quantizer.indices_to_codes(latent), rtol=0, atol=TOLERANCE)
        assert loss.shape == codes.mean(dim=(1, 2, 3), keepdim=True).shape
        assert not loss.any()
    reconstruction = tokenizer.decode(latent)
    torch.testing.assert_close(load_jit(folder, "decoder")(latent), reconstruction, rtol=0, atol=TOLERANCE)
    outputs = load_jit(folder, "autoencoder")(picture)
    torch.testing.assert_close(outputs[0], reconstruction, rtol=0, atol=TOLERANCE)
    assert torch.equal(outputs[2], latent)


def test_torchscript_has_the_published_state_dict(exported: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = exported
    config = tokenizer.tokenizer_config
    assert read_json(folder / "config.json") == config.to_dict()
    tensors = names.to_reference_names(tokenizer.state_dict(), config)
    found = published.read_weights(folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].to(tensors[name].dtype), tensors[name]) for name in tensors)
    decoder = {name for name in tensors if name.startswith(("post_quant_conv.", "decoder."))}
    decoder |= {f"inv_quant.{name}" for name in tensors if name.startswith("quantizer.")}
    assert set(load_jit(folder, "decoder").state_dict()) == decoder
    assert set(load_jit(folder, "autoencoder").state_dict()) == tensors.keys()


def test_what_is_loaded_can_be_cast(exported: tuple[Tokenizer, Path]) -> None:
    """The reference casts to bfloat16 what it loads."""
    tokenizer, folder = exported
    picture = picture_of(tokenizer.tokenizer_config, chunks=1).bfloat16()
    latent = load_jit(folder, "encoder").to(torch.bfloat16)(picture)[0]
    found = load_jit(folder, "decoder").to(torch.bfloat16)(latent)
    assert found.dtype == torch.bfloat16
    expected = tokenizer.decode(latent.float() if latent.is_floating_point() else latent)
    # Some ten layers, each rounded to 8 bits.
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
@pytest.mark.parametrize("config", [VIDEO, DISCRETE_IMAGE], ids=lambda config: config.family)
def test_onnx_gives_what_the_model_gives(config: TokenizerConfig, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    tokenizer = random_tokenizer(config).requires_grad_(False)
    folder = export(tokenizer, tmp_path / "folder", to="onnx")
    for name in ("encoder", "decoder"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
    picture = picture_of(config, chunks=2)
    latent = tokenizer.encode(picture)
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    outputs = encoder.run(None, {config.modality: picture.numpy()})
    word = "latent" if config.levels is None else "indices"
    assert [output.name for output in encoder.get_outputs()] == [word, *(["codes"] if config.levels else [])]
    torch.testing.assert_close(torch.from_numpy(outputs[0]), latent, rtol=0, atol=TOLERANCE)
    (found,) = decoder.run(["reconstruction"], {word: latent.numpy()})
    expected = tokenizer.decode(latent)
    assert (torch.from_numpy(found) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "config", [pytest.param(DISCRETE, id="DV", marks=pytest.mark.slow), pytest.param(IMAGE, id="CI")]
)
def test_exported_programs_give_what_the_model_gives(config: TokenizerConfig, tmp_path: Path) -> None:
    tokenizer = random_tokenizer(config).requires_grad_(False)
    folder = export(tokenizer, tmp_path / "folder", to="torch_export")
    encoder, decoder = (torch.export.load(folder / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    picture = picture_of(config, chunks=3)
    latent = tokenizer.encode(picture)
    assert torch.equal(encoder(picture)[0], latent)
    torch.testing.assert_close(decoder(latent), tokenizer.decode(latent), rtol=0, atol=TOLERANCE)


def test_a_file_that_gives_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    write = export_module._write_torchscript

    def write_wrong(part: export_module._Part, folder: Path, config: TokenizerConfig) -> Callable[[Tensor], Any]:
        program = write(part, folder, config)
        return program if part.name == "encoder" else lambda x: program(x) * float("nan")

    monkeypatch.setattr(export_module, "_write_torchscript", write_wrong)
    with pytest.raises(UserError, match="folder/decoder: got 'outputs of which 100.00% differ from the model'"):
        export(random_tokenizer(IMAGE), tmp_path / "folder", to="torchscript")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert not any((tmp_path / "folder").iterdir())


def test_a_file_with_an_output_less_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_write_torchscript", lambda part, *_: lambda x: part.module(x)[0])
    with pytest.raises(UserError, match="folder/encoder: outputs: got 1, expected 3, as the model gives"):
        export(random_tokenizer(IMAGE), tmp_path / "folder", to="torchscript")


@pytest.mark.parametrize(("num_wrong", "is_refused"), [(1, False), (2, True)])
def test_one_index_in_a_thousand_may_differ(
    num_wrong: int, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(part: export_module._Part, *_: object) -> Callable[[Tensor], Any]:
        def run(picture: Tensor) -> Any:
            outputs = part.module(picture)
            if part.name == "encoder":
                outputs[0].flatten()[:num_wrong] += 1
            return outputs

        return run

    monkeypatch.setattr(export_module, "_write_torchscript", write)
    tokenizer = random_tokenizer(DISCRETE_IMAGE)
    if is_refused:
        with pytest.raises(UserError, match="folder/encoder: got 'outputs of which 0.19% differ"):
            export(tokenizer, tmp_path / "folder", to="torchscript")
    else:
        export(tokenizer, tmp_path / "folder", to="torchscript")


def test_onnx_needs_its_packages_and_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--to onnx: got torch.bfloat16, expected float32"):
        export(random_tokenizer(IMAGE).bfloat16(), tmp_path / "folder", to="onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\['onnx', 'onnxruntime'\] cannot be imported"):
        export(random_tokenizer(IMAGE), tmp_path / "folder", to="onnx")
