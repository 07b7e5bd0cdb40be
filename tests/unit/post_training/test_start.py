"""The base of a post-training is found when the run starts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_cosmos.checkpoints import embedded
from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.post_training import start
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import preset
from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
from nemo_cosmos.tokenizer.step import TokenizerModel
from nemo_cosmos.training.defaults import default_log, default_resume


def write_checkpoint(folder: Path) -> Path:
    (folder / "weights").mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt"):
        (folder / "weights" / name).touch()
    return folder


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the training was started with."""
    given: dict[str, Any] = {}

    def finetune(model: object, data: object, trainer: object, **others: object) -> Path:
        given.update(model=model, data=data, trainer=trainer, **others)
        return Path("run")

    monkeypatch.setattr(start.api, "finetune", finetune)
    return given


def wfm(init_from: str | None = None) -> dict[str, str]:
    return {"init_from": init_from} if init_from else {}


def latents(statistics_of: str) -> dict[str, str]:
    return {"statistics_of": statistics_of}


def post_train(base: str) -> None:
    start.finetune(wfm, latents, "trainer", log="log", optim="optim", base=base, may_lack=("action",))


def test_embedded_name_is_found_where_the_package_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: dict[str, Any]
) -> None:
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    (tmp_path / "small.safetensors").touch()
    post_train("small")
    assert called["model"] == {"init_from": str(tmp_path / "small.safetensors")}
    assert called["data"] == {"statistics_of": str(tmp_path / "small.json")}
    assert called["base"] is None


def test_checkpoint_folder_is_loaded_by_the_training(tmp_path: Path, called: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "step=0000010")
    post_train(str(folder))
    assert called["model"] == {}
    assert called["data"] == {"statistics_of": str(folder / "card.json")}
    assert (called["base"], called["may_lack"]) == (str(folder), ("action",))
    assert (called["log"], called["optim"], called["resume"]) == ("log", "optim", None)


def test_a_run_that_goes_on_needs_no_base(tmp_path: Path, called: dict[str, Any]) -> None:
    resumed = write_checkpoint(tmp_path / "run" / "checkpoints" / "step=0000010")
    card = CheckpointCard(model="m", config={}, step=10, data="d", command="c", parent="runs/gone")
    write_json(resumed / "card.json", card.to_dict())
    log, resume = default_log(tmp_path / "run"), default_resume()
    start.finetune(wfm, latents, "trainer", log=log, optim="optim", base="runs/gone", resume=resume)
    assert (called["model"], called["data"]) == ({}, {"statistics_of": str(resumed / "card.json")})
    assert called["base"] == "runs/gone"


def test_models_and_data_of_a_tokenizer_need_no_card(tmp_path: Path, called: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "step=0000010")
    start.finetune(lambda: "tokenizer", lambda: "clips", "trainer", log="log", optim="optim", base=str(folder))
    assert (called["model"], called["data"], called["base"]) == ("tokenizer", "clips", str(folder))
    (tmp_path / "whole.safetensors").touch()
    with pytest.raises(UserError, match=r"base: got .*whole\.safetensors"):
        start.finetune(
            lambda: 0, lambda: 0, "trainer", log="log", optim="optim", base=str(tmp_path / "whole.safetensors")
        )


def test_run_folder_stands_for_its_newest_finished_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        write_checkpoint(checkpoints / f"step={step:07d}")
    (checkpoints / "step=0000030-unfinished").touch()
    (checkpoints / "step=0000020-last").symlink_to("step=0000020")
    assert start.find_base(str(tmp_path / "run")).weights == checkpoints / "step=0000020"


def test_file_has_its_card_beside_it(tmp_path: Path) -> None:
    (tmp_path / "whole.safetensors").touch()
    found = start.find_base(str(tmp_path / "whole.safetensors"))
    assert (found.weights, found.card) == (tmp_path / "whole.safetensors", tmp_path / "whole.json")


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        start.find_base(str(tmp_path / "run"))
    with pytest.raises(UserError, match="nowhere: neither a folder nor embedded weights"):
        start.find_base(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="checkpoint nothing: neither a folder nor embedded weights"):
        start.find_base("nothing")


def test_a_tokenizers_base_may_be_embedded(called: dict[str, Any]) -> None:
    config = TokenizerModelConfig(architecture=preset("CV8x8x8-tiny"))
    model = functools.partial(TokenizerModel, config=config)
    start.finetune(model, lambda: "clips", "trainer", log="log", optim="optim", base="tokenizer_tiny")
    path = embedded.embedded_path("tokenizer_tiny")
    assert called["base"] is None
    assert called["model"].init_from == str(path)
    assert config.init_from is None
    module = called["model"].config.configure_model()
    for name, tensor in weights.load(path).state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.parametrize("form", ["diffusers", "published"])
def test_a_tokenizers_base_may_be_in_the_form_of_others(form: str, tmp_path: Path, called: dict[str, Any]) -> None:
    if form == "published":
        convert("tokenizer_tiny", tmp_path / "base" / "model.pt", to="reference")
        write_json(tmp_path / "base" / "config.json", preset("CV8x8x8-tiny").to_dict())
    else:
        convert("tokenizer_tiny", tmp_path / "base", to=form)
    model = functools.partial(TokenizerModel, config=TokenizerModelConfig(architecture=preset("CV8x8x8-tiny")))
    start.finetune(model, lambda: "clips", "trainer", log="log", optim="optim", base=str(tmp_path / "base"))
    assert (called["base"], called["model"].init_from) == (None, str(tmp_path / "base"))


def test_a_base_in_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    for config in (None, {"_class_name": "CosmosTransformer3DModel"}):
        if config is not None:
            write_json(tmp_path / "config.json", config)
        with pytest.raises(UserError, match="is a diffusers folder. Convert it first"):
            start.find_base(str(tmp_path))
