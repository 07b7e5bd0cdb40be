from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from tests.unit.tokenizer.conftest import DISCRETE, DISCRETE_IMAGE, ODD, TINY, random_tokenizer

CARD = CheckpointCard(model="tokenizer_tiny", config={}, step=7, data="none", command="test")


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (ODD, torch.float32),
        (ODD, torch.bfloat16),
        (DISCRETE, torch.float32),
        (DISCRETE_IMAGE, torch.bfloat16),
    ],
)
def test_folder_round_trip(config: TokenizerConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = random_tokenizer(config).to(dtype)
    back = weights.load(weights.save(tokenizer, tmp_path / "tokenizer"), dtype=dtype)
    assert back.tokenizer_config == config
    assert back.fingerprint() == tokenizer.fingerprint()
    assert {weight.dtype for weight in back.parameters()} == {dtype}


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    weights.save(random_tokenizer(TINY), tmp_path / "tokenizer")
    weights.save(random_tokenizer(ODD), tmp_path / "tokenizer")
    assert weights.load(tmp_path / "tokenizer").tokenizer_config == ODD
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    folder = weights.save(random_tokenizer(TINY), tmp_path / "tokenizer")
    (folder / weights.WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        weights.load(folder)
    with pytest.raises(UserError, match="config.json: no such file"):
        weights.load(tmp_path)


def test_the_embedded_default_loads(tmp_path: Path) -> None:
    tokenizer = random_tokenizer(TINY).bfloat16()
    path = tmp_path / "tokenizer_tiny.safetensors"
    weights.write_tensors(path, tokenizer.state_dict())
    write_json(path.with_suffix(".json"), CARD.to_dict() | {"config": TINY.to_dict()})
    back = weights.load_default(path)
    assert back.tokenizer_config == TINY
    assert back.fingerprint() == tokenizer.fingerprint()


def test_missing_default_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Train one with the recipe"):
        weights.load_default(tmp_path / "tokenizer_tiny.safetensors")


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    weights.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == plain.stat().st_mode
