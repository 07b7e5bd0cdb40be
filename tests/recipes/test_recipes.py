"""Every recipe is complete, survives nemo-run's serialisation, and takes typed overrides."""

from __future__ import annotations

import inspect
import pickle
import typing
from pathlib import Path

import fiddle
import nemo_run as run
import pytest
from fiddle import daglish
from fiddle.experimental import serialization
from nemo_run.cli.cli_parser import parse_cli_args
from nemo_run.cli.config import ConfigSerializer

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.losses import weight_at
from recipes import registry
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


@pytest.mark.parametrize("override", ["trainer.max_stepz=5", "trainer.max_steps=soon", "trainer", "nothing.at.all=1"])
def test_bad_override_is_one_clear_error(override: str) -> None:
    with pytest.raises(UserError, match=r"override: got '.*expected `name=value`"):
        configure("diffusion_tiny_pretrain", [override])


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="recipe: got 'diffusion_70b'.*diffusion_7b_pretrain"):
        registry.find("diffusion_70b")


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("diffusion_7b_pretrain", 4),
        ("diffusion_14b_pretrain", 8),
        ("diffusion_7b_video2world_finetune", 4),
        ("diffusion_14b_video2world_finetune", 8),
        ("diffusion_7b_action_finetune", 4),
    ],
)
def test_published_sizes_fit_their_layout(name: str, tp: int) -> None:
    from nemo_cosmos.diffusion.config import check_layout

    recipe = registry.find(name)()
    assert recipe.trainer.tp == tp
    config = fiddle.build(recipe.model.config)
    config.sequence_parallel = recipe.trainer.sp
    latent_57_frames_512p = (8, 64, 80)
    num_tokens = 8 * 32 * 40
    assert config.token_grid(latent_57_frames_512p) == (8, 32, 40)
    check_layout(config, recipe.trainer.tp, 1, recipe.trainer.cp, num_tokens)
    ranks = recipe.trainer.devices * recipe.trainer.num_nodes
    data_parallel = ranks // (recipe.trainer.tp * recipe.trainer.cp)
    assert recipe.data.global_batch_size % (recipe.data.micro_batch_size * data_parallel) == 0


@pytest.mark.parametrize(
    ("name", "weight_decay"),
    [
        ("diffusion_7b_action_finetune", 0.1),
        ("diffusion_7b_video2world_finetune", 0.1),
        ("diffusion_14b_video2world_finetune", 0.2),
    ],
)
def test_post_training_of_published_sizes_has_the_published_values(name: str, weight_decay: float) -> None:
    recipe = registry.find(name)()
    optim, trainer = recipe.optim, recipe.trainer
    assert (optim.lr, optim.warmup, optim.weight_decay, optim.eps) == (2**-14.3, 2500, weight_decay, 1e-10)
    assert (trainer.ema_power, trainer.async_save) == (6.94, False)
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


def test_no_recipe_keeps_averages_while_it_saves_in_the_background() -> None:
    for recipe in (make() for make in (registry.PRETRAIN | registry.FINETUNE).values()):
        trainer = fiddle.ordered_arguments(recipe.trainer, include_defaults=True)
        assert trainer["ema_power"] is None or not trainer["async_save"]


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_video2world_starts_from_text2world(size: str) -> None:
    text2world = registry.find(f"diffusion_{size}_pretrain")()
    video2world = registry.find(f"diffusion_{size}_video2world_finetune")()
    assert video2world.base == text2world.log.directory
    assert fiddle.build(video2world.model.config).patch_channels == fiddle.build(text2world.model.config).patch_channels
    given = fiddle.build(video2world.model.conditioning)
    assert (given.min_condition_frames, given.max_condition_frames, given.condition_dropout) == (1, 2, 0.5)


def test_actions_start_from_video2world() -> None:
    base = registry.find("diffusion_7b_video2world_finetune")()
    actions = registry.find("diffusion_7b_action_finetune")()
    assert actions.base == base.log.directory
    assert fiddle.build(actions.model.config).concat_condition_mask
