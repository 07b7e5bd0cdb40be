"""From the folder of a diffusers pipeline, the same noise and the same prompts: our latents are the pipeline's."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCosmos,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
)
from diffusers.pipelines.cosmos import pipeline_cosmos_text2world, pipeline_cosmos_video2world
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from nemo_cosmos.checkpoints import pipeline_folder
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.checkpoints.pipeline_folder import PipelineFolder
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.generation import open as opening
from nemo_cosmos.generation.open import find_world_model, open_world_model
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.conversion import save_diffusers
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.weight_files.safetensors_files import open_shards

pytestmark = pytest.mark.usefixtures("torchvision_resize")

HEIGHT, WIDTH, FRAMES, SEED = 32, 48, 17, 5
SAMPLING = SamplingConfig(
    num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=30.0, num_steps=4, sampler="euler", guidance=7.0, seed=SEED
)
WORDS = ("a", "red", "car", "turns", "left", "blurry", "video")
TOLERANCE = 1e-3
"""Four steps from sigma 80 with the branches' difference seven times: 2e-5 of one network call grow to this."""


class SafetyChecker:
    """Stands in for the guardrail package that diffusers' pipelines ask for."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True


class Kind(NamedTuple):
    pipeline: type[DiffusionPipeline]
    module: ModuleType
    in_channels: int


KINDS = {
    "text": Kind(CosmosTextToWorldPipeline, pipeline_cosmos_text2world, 16),
    "video": Kind(CosmosVideoToWorldPipeline, pipeline_cosmos_video2world, 17),
}


def _randomize(model, std):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            shift, scale = (1.0, 0.2) if parameter.ndim == 1 else (0.0, std / parameter.shape[-1] ** 0.5)
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _pipeline(kind, folder):
    torch.manual_seed(0)
    config = TokenizerConfig(channels=8, num_res_blocks=1)
    save_diffusers(CausalVideoTokenizer(config).state_dict(), config, folder / "vae")
    vae = AutoencoderKLCosmos.from_pretrained(folder / "vae")
    frames = 1 + (FRAMES - 1) // 8
    numbers = np.random.default_rng(0)
    # As the published VAE has them: numbers per channel and latent frame, more frames than are generated here.
    vae.register_to_config(
        latents_mean=numbers.normal(size=16 * (frames + 1)).tolist(),
        latents_std=numbers.uniform(0.5, 2.0, size=16 * (frames + 1)).tolist(),
    )
    transformer = CosmosTransformer3DModel(
        in_channels=KINDS[kind].in_channels,
        out_channels=16,
        num_attention_heads=3,
        attention_head_dim=24,
        num_layers=2,
        mlp_ratio=4.0,
        text_embed_dim=20,
        adaln_lora_dim=16,
        max_size=(6, 16, 16),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
    )
    encoder = T5EncoderModel(T5Config(vocab_size=16, d_model=20, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<pad>", "<unk>", *WORDS))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return KINDS[kind].pipeline(
        text_encoder=_randomize(encoder, 1.0),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<pad>",
            unk_token="<unk>",
            model_input_names=["input_ids", "attention_mask"],  # as T5's
        ),
        transformer=_randomize(transformer, 0.7),
        vae=vae,
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=SafetyChecker(),
    )


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object, Path]:
    """Kind, pipeline, and the folder that it saved itself to."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = _pipeline(request.param, folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return request.param, pipeline, folder / "pipeline"


@pytest.mark.parametrize("num_first_frames", [1, 9])
def test_latents_equal_those_of_the_pipeline(saved, monkeypatch, num_first_frames):
    kind, pipeline, folder = saved
    if kind == "text" and num_first_frames > 1:
        pytest.skip("Text2World takes no frames")
    latent_size = (16, 1 + (FRAMES - 1) // 8, HEIGHT // 8, WIDTH // 8)
    noise, augment_noise = torch.randn(2, *latent_size, generator=torch.Generator().manual_seed(SEED))
    # The pipeline draws noise for the given frames anew at every step and for each branch; here it is one noise.
    monkeypatch.setattr(KINDS[kind].module, "randn_tensor", lambda *_, **__: augment_noise[None])
    frames = np.random.default_rng(1).integers(0, 255, (num_first_frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
    prompts = {"prompt": "a red car turns left", "negative_prompt": "a blurry video"}
    given = {} if kind == "text" else {"video": [Image.fromarray(frame) for frame in frames]}
    expected = pipeline(
        **prompts,
        **given,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=4,
        guidance_scale=7.0,
        fps=30,
        latents=noise[None],
        output_type="latent",
    ).frames
    with open_world_model(folder) as model:
        ours = model.sample(
            [prompts["prompt"]],
            SAMPLING,
            negative_prompt=prompts["negative_prompt"],
            first_frames=[frames] if given else None,
        )
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
        unguided = model.sample(
            [prompts["prompt"]], SAMPLING, negative_prompt="video", first_frames=[frames] if given else None
        )
        assert (unguided - expected).abs().max() > 10 * TOLERANCE


def test_a_pipelines_network_is_read_weight_by_weight(saved, monkeypatch):
    _, pipeline, folder = saved
    alive, most = weakref.WeakSet(), 0

    def opened(*place):
        def read(weight):
            nonlocal most
            tensor = weight.read()
            alive.add(tensor)
            most = max(most, len(alive))
            return tensor

        weights = open_shards(*place)
        return {name: replace(weight, read=partial(read, weight)) for name, weight in weights.items()}

    monkeypatch.setattr(pipeline_folder, "open_shards", opened)
    with initialize():
        network = PipelineFolder(folder).network().load()
    theirs = pipeline.transformer.state_dict()
    assert torch.equal(network.state_dict()["final_layer.linear.weight"], theirs["proj_out.weight"])
    # The three of a fused weight, and the one before them; all at once would be as many as there are.
    assert 1 <= most <= 4 < len(theirs)


def test_a_pipeline_is_found_without_building_its_tokenizer(saved, monkeypatch):
    _, _, folder = saved
    expected = load_tokenizer(folder / "vae").model.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(weights, "build", lambda *_, **__: pytest.fail("the tokenizer was built"))
        source = find_world_model(folder)
    assert source.network.card.tokenizer_fingerprint == expected
    monkeypatch.setattr(opening, "find_world_model", lambda *_: pytest.fail("it was looked for again"))
    with open_world_model(source, offload=True):
        pass


def test_a_pipeline_of_another_kind_is_refused(saved, tmp_path):
    _, _, folder = saved
    other = tmp_path / "other"
    write_json(other / "model_index.json", {"_class_name": "CosmosVideoToWorldPipeline"})
    write_json(other / "scheduler" / "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(UserError, match=r"FlowMatchEulerDiscreteScheduler.*EDMEulerScheduler"), open_world_model(other):
        pass
    index = read_json(folder / "model_index.json") | {"_class_name": "Cosmos2VideoToWorldPipeline"}
    write_json(other / "model_index.json", index)
    with pytest.raises(UserError, match="Cosmos2VideoToWorldPipeline"), open_world_model(other):
        pass
