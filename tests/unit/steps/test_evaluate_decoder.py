"""A diffusion decoder beside its tokens' own decoder, from files to files."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.generation.diffusion_decoder import DecodingConfig
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.steps import evaluate_decoder as step
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.load import LoadedTokenizer
from nemo_cosmos.tokenizer.model import build_tokenizer
from tests.unit.generation.test_diffusion_decoder import decoder
from tests.unit.steps.test_evaluate_tokenizer import MeanDifference

FEW = DecodingConfig(num_steps=1, guidance=0.0)
DISCRETE = TokenizerConfig(channels=8, num_res_blocks=1, latent_channels=4, levels=(2, 2, 2, 2))


@pytest.fixture
def models(monkeypatch):
    """The discrete tokenizer's fingerprint; opening a model by name gives one of random weights."""
    monkeypatch.setattr(step, "LpipsLike", MeanDifference)
    discrete = build_tokenizer(DISCRETE).eval()
    continuous = build_tokenizer(TokenizerConfig(channels=8, num_res_blocks=1)).eval()
    by_name = {"discrete": discrete, "continuous": continuous}
    monkeypatch.setattr(step, "load_tokenizer", lambda name: LoadedTokenizer(model=by_name[name], name=name))

    @contextlib.contextmanager
    def opened(checkpoint, tokenizer):
        assert (checkpoint, tokenizer) == ("decoder", "continuous")
        with initialize():
            yield decoder(1, token_fingerprint=discrete.fingerprint())

    monkeypatch.setattr(step, "open_diffusion_decoder", opened)


def run(curated, output, **given):
    given = {"discrete_tokenizer": "discrete", "tokenizer": "continuous", "decoding": FEW, **given}
    return step.evaluate_decoder(curated, output, checkpoint="decoder", height=32, width=32, **given)


def test_both_decoders_are_measured_on_the_same_windows(models, curated, tmp_path):
    result = run(curated, tmp_path / "out")
    assert result["num_clips"] == 1  # one clip of 25 frames is held out
    assert set(result["methods"]) == {step.OWN, step.DIFFUSION, step.CEILING}
    assert all(result["methods"][name]["seconds"] > 0 for name in (step.OWN, step.DIFFUSION))
    written = read_json(tmp_path / "out" / "measures.json")
    (own,), (decoded,) = written["videos"][step.OWN], written["videos"][step.DIFFUSION]
    for name in step.MEASURES:
        assert result["differences"][name] == {
            "mean": pytest.approx(decoded[name] - own[name]),
            "standard_error": None,
        }
    assert own["source"] == "street" and decoded["psnr_db"] != own["psnr_db"]
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert sheet.ndim == 3 and sheet.std() > 0


def test_a_tokenizer_without_codes_is_refused(models, curated, tmp_path):
    with pytest.raises(UserError, match="discrete tokenizer: got 'continuous', expected one with codes"):
        run(curated, tmp_path / "out", discrete_tokenizer="continuous")
    assert not (tmp_path / "out").exists()
