"""Every recipe is complete, survives nemo-run's serialisation, and takes typed overrides."""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
import re
import typing
from pathlib import Path

import fiddle
import nemo_run as run
import pytest
from fiddle import daglish
from fiddle.experimental import serialization
from nemo_run.cli.cli_parser import parse_cli_args
from nemo_run.cli.config import ConfigSerializer

from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.losses import weight_at
from recipes import registry
from recipes.diffusion_stages import STAGES
from recipes.launch import configure


@pytest.mark.parametrize("name", registry.RECIPES)
def test_recipe_is_a_partial_with_every_required_argument(name: str) -> None:
    recipe = registry.find(name)()
    assert isinstance(recipe, run.Partial)
    for value, _ in daglish.iterate(recipe):
        if isinstance(value, fiddle.Buildable):
            inspect.signature(fiddle.get_callable(value)).bind(**fiddle.ordered_arguments(value))


@pytest.mark.parametrize("name", registry.RECIPES)
def test_recipe_survives_what_executors_send_over(name: str) -> None:
    recipe = registry.find(name)()
    assert serialization.load_json(serialization.dump_json(recipe)) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert ConfigSerializer().deserialize_yaml(registry.as_yaml(name)).__fn_or_cls__ is recipe.__fn_or_cls__


@pytest.mark.parametrize("name", registry.RECIPES)
def test_recipe_holds_no_path_of_this_machine(name: str) -> None:
    """It may run in a container or on a cluster, where the package lies elsewhere."""
    assert str(Path(__file__).parents[2]) not in serialization.dump_json(registry.find(name)())


def test_base_of_a_post_training_can_be_overridden() -> None:
    recipe = configure("diffusion_tiny_action_finetune", ["base=runs/short", "data.micro_batch_size=8"])
    assert (recipe.base, recipe.data.micro_batch_size) == ("runs/short", 8)


@pytest.mark.parametrize("name", registry.RECIPES)
def test_overrides_of_paths_can_be_sent_over(name: str) -> None:
    recipe = registry.find(name)()
    paths = [
        (value, argument)
        for value, _ in daglish.iterate(recipe)
        if isinstance(value, fiddle.Buildable)
        for argument, parameter in inspect.signature(fiddle.get_callable(value)).parameters.items()
        if parameter.annotation is Path or Path in typing.get_args(parameter.annotation)
    ]
    assert paths
    for value, argument in paths:
        parse_cli_args(value, [f"{argument}=some/where"])
        assert getattr(value, argument) == "some/where"
    assert serialization.load_json(serialization.dump_json(recipe)) == recipe


@pytest.mark.parametrize("name", ["diffusion_tiny_action_finetune", "diffusion_7b_video2world_finetune"])
def test_post_training_makes_model_and_data_once_the_base_is_found(name: str) -> None:
    recipe = registry.find(name)()
    model, data = fiddle.build(recipe.model), fiddle.build(recipe.data)
    assert model(init_from="base.safetensors").init_from == "base.safetensors"
    assert model().init_from is None
    with pytest.raises(UserError, match=r"runs/nowhere"):
        data(path="runs/nowhere", statistics_of="card.json")


def test_every_recipe_has_one_line_to_describe_it() -> None:
    lines = registry.describe()
    assert set(lines) == set(registry.RECIPES)
    assert all(line.endswith(".") and len(line) < 130 for line in lines.values())


def test_fresh_configurations_share_nothing() -> None:
    first, second = registry.find("diffusion_tiny_pretrain")(), registry.find("diffusion_tiny_pretrain")()
    first.trainer.max_steps = 1
    assert second.trainer.max_steps == 6000


def test_overrides_get_the_types_of_the_targets() -> None:
    overrides = [
        "trainer.max_steps=5",
        "trainer.sp=true",
        "trainer.vp=None",
        "optim.lr=3e-4",
        "data.sources=('street','arm')",
        "model.config.num_layers=3",
        "model.conditioning.text_dropout=0.5",
    ]
    recipe = configure("diffusion_tiny_pretrain", overrides)
    assert recipe.trainer.max_steps == 5
    assert recipe.trainer.sp is True
    assert recipe.trainer.vp is None
    assert recipe.optim.lr == 3e-4
    assert recipe.data.sources == ("street", "arm")
    assert fiddle.build(recipe.model.config).num_layers == 3
    assert fiddle.build(recipe.model.conditioning).text_dropout == 0.5


NAMES = r"expected `name=value` with a name that `nemo-cosmos recipes show` lists\."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer", rf"override: got 'trainer', {NAMES} Write a value behind its name\."),
        ("trainer.max_stepz=5", rf"override: got .*, {NAMES} .* No parameter named 'max_stepz' exists"),
        ("nothing.at.all=1", rf"override: got .*, {NAMES} nemo-run says: .*"),
        ("trainer.max_steps=soon", r"override trainer.max_steps: got 'soon', expected int\. Correct the value\."),
        ("trainer.fsdp=megatron", r"override trainer.fsdp: got 'megatron', expected 'pytorch' or None\. Correct .*"),
        ("trainer.precision=fp8", r"override .*: got 'fp8', expected 'bf16-mixed' or '32' or None\. Correct .*"),
        ("optim.decay=no", r"override .*: got 'no', expected one of \('cosine', 'linear', 'constant'\)\. Correct .*"),
    ],
)
def test_bad_override_is_one_clear_line(override: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    configure("diffusion_tiny_pretrain", [])  # imports, which may log
    caplog.clear()
    with pytest.raises(UserError) as refused:
        configure("diffusion_tiny_pretrain", [override])
    assert re.fullmatch(message, str(refused.value)) and not caplog.records


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="recipe: got 'diffusion_70b'.*diffusion_7b_pretrain"):
        registry.find("diffusion_70b")


LATENT_512P, LATENT_720P = (8, 64, 80), (16, 88, 160)
"""57 frames of 640x512, and 121 of 1280x704."""

PUBLISHED = [
    *((f"diffusion_{size}_pretrain", tp, LATENT_512P) for size, tp in (("7b", 4), ("14b", 8))),
    *(
        (f"diffusion_{size}_{stage}_finetune", tp, LATENT_720P)
        for size, tp in (("7b", 4), ("14b", 8))
        for stage in ("highres", "cooldown", "video2world")
    ),
    ("diffusion_7b_action_finetune", 4, LATENT_512P),
]


@pytest.mark.parametrize(("name", "tp", "latent"), PUBLISHED)
def test_published_sizes_fit_their_layout(name: str, tp: int, latent: tuple[int, int, int]) -> None:
    from nemo_cosmos.diffusion.config import check_layout

    recipe = registry.find(name)()
    assert (recipe.trainer.ema_power, recipe.trainer.async_save) == (6.94, True)
    assert (recipe.trainer.tp, recipe.trainer.cp) == (tp, {LATENT_512P: 2, LATENT_720P: 8}[latent])
    config = fiddle.build(recipe.model.config)
    config.sequence_parallel = recipe.trainer.sp
    for frames in (latent[0], 1):  # pictures too
        num_tokens = math.prod(config.token_grid((frames, *latent[1:])))
        check_layout(config, recipe.trainer.tp, 1, recipe.trainer.cp, num_tokens)
    ranks = recipe.trainer.devices * recipe.trainer.num_nodes
    data_parallel = ranks // (recipe.trainer.tp * recipe.trainer.cp)
    assert data_parallel >= 1
    assert recipe.data.global_batch_size % (recipe.data.micro_batch_size * data_parallel) == 0


def test_packs_of_the_published_size_are_not_cut_over_context_parallel_ranks() -> None:
    recipe = registry.find("diffusion_7b_packed_pretrain")()
    assert (recipe.trainer.tp, recipe.trainer.cp, recipe.data.global_batch_size) == (8, 1, 32)
    assert recipe.data.paths == ("runs/latents", "runs/pictures")


def test_published_resolutions_have_the_published_context_lengths() -> None:
    config = fiddle.build(registry.find("diffusion_7b_pretrain")().model.config)
    assert [math.prod(config.token_grid(latent)) for latent in (LATENT_512P, LATENT_720P)] == [10_240, 56_320]


@pytest.mark.parametrize("name", [name for name, _, _ in PUBLISHED if name.endswith("finetune")])
def test_post_training_of_published_sizes_has_the_published_values(name: str) -> None:
    recipe = registry.find(name)()
    optim = recipe.optim
    weight_decay = 0.2 if "14b" in name else 0.1
    assert (optim.lr, optim.warmup, optim.weight_decay, optim.eps) == (2**-14.3, 2500, weight_decay, 1e-10)
    assert registry.find(name)(max_steps=100).optim.warmup == 50


STAGES_720P = [f"tokenizer_cv8x8x8_720p_{stage}" for stage in ("pretrain", "flow_finetune", "adversarial_finetune")]
STAGES_TINY = [f"tokenizer_tiny_{stage}" for stage in ("pretrain", "flow_finetune", "adversarial_finetune")]


@pytest.mark.parametrize("name", STAGES_720P)
def test_720p_tokenizer_trains_as_published(name: str) -> None:
    recipe = registry.find(name)()
    optim, data, trainer = recipe.optim, recipe.data, recipe.trainer
    assert (optim.lr, optim.betas, optim.warmup) == (1e-4, (0.5, 0.999), 5000)
    assert fiddle.build(optim).config.weight_decay == 0.01
    assert (data.num_frames, data.height, data.width, data.crop_from) == (121, 256, 256, 720)
    assert (data.pictures_every, data.global_batch_size, trainer.ema_decay) == (2, 8, 0.9999)
    assert registry.find(name)(num_nodes=2).data.global_batch_size == 16
    config = fiddle.build(recipe.model.config)
    assert (config.recompute_granularity, config.recompute_method) == ("full", "uniform")


def test_720p_tokenizer_has_the_published_weights() -> None:
    pretrain, flow, last = (fiddle.build(registry.find(name)().model.config).loss for name in STAGES_720P)
    at = {step: {name: weight_at(getattr(pretrain, name), step) for name in WEIGHTS} for step in (0, 499_999, 500_000)}
    assert at[0] == at[499_999] == dict(zip(WEIGHTS, (1.0, 0.1, 0.0, 0.0, 0.0), strict=True))
    assert at[500_000] == dict(zip(WEIGHTS, (1.0, 0.073, 0.062, 0.0, 0.0), strict=True))
    assert flow == last
    assert [getattr(flow, name) for name in WEIGHTS] == [1.0, 0.073, 0.062, 0.01, 0.0]


IMAGE_STAGES = [
    [f"tokenizer_{family}_{size}_{stage}" for stage in ("pretrain", "gram_finetune", "adversarial_finetune")]
    for family in ("ci8x8", "di8x8")
    for size in ("tiny", "360p")
]


@pytest.mark.parametrize("stages", IMAGE_STAGES, ids=lambda stages: stages[0])
def test_image_tokenizers_train_on_single_frames_in_three_stages(stages: list[str]) -> None:
    pretrain, gram, last = (registry.find(name)() for name in stages)
    for recipe in (pretrain, gram, last):
        config = fiddle.build(recipe.model.config)
        assert config.architecture.modality == "image"
        assert stages[0].startswith(f"tokenizer_{config.architecture.compression_name.lower()}_")
        config.check_size(recipe.data.num_frames, recipe.data.height, recipe.data.width)
        assert recipe.data.global_batch_size % recipe.data.micro_batch_size == 0
        assert recipe.optim.betas == (0.5, 0.999)
    weights = [[getattr(fiddle.build(recipe.model.config).loss, name) for name in WEIGHTS] for recipe in (gram, last)]
    assert weights == [[1.0, 0.073, 0.062, 0.0, 0.0]] * 2
    assert fiddle.build(last.model.adversary.weight).values[0] == 0
    if "360p" in stages[0]:
        loss = fiddle.build(pretrain.model.config).loss
        assert [weight_at(loss.gram_weight, step) for step in (0, 500_000)] == [0.0, 0.062]
        assert (pretrain.data.crop_from, pretrain.data.global_batch_size) == (360, 128)
        assert registry.find(stages[0])(num_nodes=2).data.global_batch_size == 256
    other = configure(stages[0], ["model.config.architecture.name=CI16x16-360p"])
    assert fiddle.build(other.model.config).architecture.spatial_compression == 16


WEIGHTS = ("l1_weight", "perceptual_weight", "gram_weight", "flow_weight", "consistency_weight")


@pytest.mark.parametrize("stages", [STAGES_TINY, STAGES_720P, *IMAGE_STAGES], ids=lambda stages: stages[0])
def test_each_stage_of_a_tokenizer_starts_from_the_one_before(stages: list[str]) -> None:
    pretrain, flow, last = (registry.find(name)() for name in stages)
    assert (flow.base, last.base) == (pretrain.log.directory, flow.log.directory)
    architectures = {fiddle.build(recipe.model.config.architecture) for recipe in (pretrain, flow, last)}
    assert len(architectures) == 1


def test_the_discriminator_begins_before_the_tokenizer_hears_of_it() -> None:
    for name in ("tokenizer_tiny_adversarial_finetune", "tokenizer_cv8x8x8_720p_adversarial_finetune"):
        adversary = registry.find(name)().model.adversary
        schedule = fiddle.build(adversary.weight)
        assert schedule.values[0] == 0
        assert 0 < schedule.boundaries[0] < registry.find(name)().trainer.max_steps
        assert fiddle.build(adversary).optimizer.param_groups[0]["lr"] == 4e-4


def test_weights_of_losses_can_be_numbers_or_schedules() -> None:
    overrides = ["model.config.loss.perceptual_weight=0.6", "model.config.loss.gram_weight.values=(0.0,0.5)"]
    recipe = configure("tokenizer_cv8x8x8_720p_pretrain", [*overrides, "model.perceptual.features.weights=hed"])
    loss = fiddle.build(recipe.model.config).loss
    assert loss.perceptual_weight == 0.6
    assert weight_at(loss.gram_weight, 500_000) == 0.5
    assert recipe.model.perceptual.features.weights == "hed"


@pytest.mark.parametrize("size", STAGES)
def test_each_stage_of_a_wfm_starts_from_the_one_before(size: str) -> None:
    recipes = [recipe() for recipe in STAGES[size]]
    for before, after in itertools.pairwise(recipes):
        assert after.base == before.log.directory
    assert len({fiddle.build(recipe.model.config).patch_channels for recipe in recipes}) == 1
    # The rate is left where it is for the next stage, until the cool-down takes it to zero.
    decays = [recipe.optim.decay for recipe in recipes]
    assert decays[1:3] == ["constant", "linear"]
    assert decays[0] == ("cosine" if size == "tiny" else "constant")


@pytest.mark.parametrize("size", STAGES)
def test_video2world_is_given_frames_as_published(size: str) -> None:
    given = fiddle.build(registry.find(f"diffusion_{size}_video2world_finetune")().model.conditioning)
    assert (given.min_condition_frames, given.max_condition_frames, given.condition_dropout) == (0, 2, 0.2)
    assert (math.log(given.augment_sigma), given.augment_p_std) == (pytest.approx(-3), 2.0)
    earlier = fiddle.build(registry.find(f"diffusion_{size}_cooldown_finetune")().model.conditioning)
    assert (earlier.condition_dropout, earlier.augment_sigma, earlier.augment_p_std) == (0, 0.001, 0)


def test_embedded_weights_are_trained_as_they_were() -> None:
    """Noise on given frames, hidden frames and pictures are for the later stages and for those who ask for them."""
    recipe = registry.find("diffusion_tiny_pretrain")()
    given = fiddle.build(recipe.model.conditioning)
    assert given == ConditioningConfig(max_condition_frames=1)
    assert (given.condition_dropout, given.augment_sigma, given.augment_p_std) == (0, 0.001, 0)
    assert (recipe.data.pictures, recipe.optim.decay, recipe.trainer.callbacks) == (None, "cosine", None)


@pytest.mark.parametrize("name", [recipe.__name__ for stages in STAGES.values() for recipe in stages])
def test_samples_and_pictures_can_be_asked_for(name: str) -> None:
    recipe = registry.find(name)(sample_every=10, tokenizer="mine")
    [sampling] = recipe.trainer.callbacks
    assert (sampling.every, sampling.tokenizer) == (10, "mine")
    if "video2world" not in name:
        assert registry.find(name)(pictures="runs/pictures").data.pictures == "runs/pictures"


def test_actions_start_from_video2world() -> None:
    base = registry.find("diffusion_7b_video2world_finetune")()
    actions = registry.find("diffusion_7b_action_finetune")()
    assert actions.base == base.log.directory
    assert fiddle.build(actions.model.config).concat_condition_mask
