"""The stages of an autoregressive WFM through their recipes, from a discrete cache and from Megatron's token files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fiddle
import nemo_run as run
import pytest
import torch

from nemo_cosmos.autoregressive.config import check_layout
from nemo_cosmos.checkpoints import nemo_format
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import LatentCacheConfig, read_cache_card
from nemo_cosmos.data.token_files import write_token_files
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.parallel import startup
from nemo_cosmos.weight_files.stored_tensor import read_all
from recipes import registry
from recipes.stages import stages_of
from tests.unit.data.curated_folder import write_curated
from tests.unit.data.test_latent_cache import AverageTokenizer, _write

VOCABULARY = 64


class Codes(AverageTokenizer):
    """Indices of the mean brightness of each cell."""

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        return ((super().encode(video_BCTHW).mean(1) * 400).round() + 30).clamp(0, VOCABULARY - 1).to(torch.int32)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of 9 frames of 32x32, of 17, and of pictures; of the first also as token files."""
    folder = tmp_path_factory.mktemp("caches")
    curated = write_curated(folder)
    for name, frames in (("short", 9), ("long", 17), ("pictures", 1)):
        config = LatentCacheConfig(num_frames=frames, height=32, width=32)
        card = _write(curated, folder / name, tokenizer=Codes(), config=config)
        write_json(folder / name / "cache.json", {**card.to_dict(), "vocab_size": VOCABULARY})
    write_token_files(folder / "short", folder / "files")
    return folder


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()


def train(recipe: run.Partial, **optim: float) -> Path:
    """Runs a recipe at a size that takes seconds; returns its last checkpoint."""
    config = recipe.model.config
    config.num_layers, config.hidden_size, config.ffn_hidden_size, config.vocab_size = 1, 80, 96, VOCABULARY
    if "video2world" in config.__fn_or_cls__.__name__:
        config.crossattn_emb_channels = 4
    recipe.data.micro_batch_size = recipe.data.global_batch_size = 2
    recipe.log.save_every, recipe.log.keep = 2, -1
    for name, value in optim.items():
        setattr(recipe.optim, name, value)
    folder = fiddle.build(recipe)()
    startup.shutdown()
    return max(path for path in (folder / "checkpoints").iterdir() if not path.name.endswith("-last"))


def rows(checkpoint: Path) -> list[dict]:
    return [json.loads(line) for line in (checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_goes_on_from_the_weights_of_the_one_before(caches: Path, tmp_path: Path) -> None:
    stages = stages_of(
        "autoregressive_tiny",
        latents=str(caches / "files"),
        latents_highres=str(caches / "long"),
        latents_quality=str(caches / "long"),
        pictures_highres=str(caches / "pictures"),
        directory=str(tmp_path),
        max_steps=(4, 2, 2, 2),
    )
    assert [stage.name for stage in stages] == ["pretrain", "long", "video2world", "cooldown"]
    # Where nothing is learned the weights are those that a stage begins with.
    ends = [train(stage.recipe, lr=0.0 if stage.name == "video2world" else 1e-3) for stage in stages]
    cards = [CheckpointCard.from_dict(read_json(end / "card.json")) for end in ends]
    assert [Path(card.parent).parent.parent.name for card in cards[1:]] == ["pretrain", "long", "video2world"]
    assert [card.config["yarn"] is None for card in cards] == [True, False, False, False]
    assert [card.text_encoder for card in cards] == ["", "length", "length", "length"]
    assert {card.latent_mean for card in cards} == {None}
    before, after = (read_all(nemo_format.open_weights(end)) for end in ends[1:3])
    assert all(torch.equal(after[name][: len(weight)], weight) for name, weight in before.items())
    assert after.keys() - before.keys() == {name for name in after if "cross_att" in name or "cross_attn" in name}
    specials = after["embedding.weight"][VOCABULARY : VOCABULARY + 3]
    assert specials.std(dim=1).min() > 0.5  # drawn from a standard normal law, not Megatron's zeros
    assert [row["lr"] for row in rows(ends[3])] == pytest.approx([1e-3, 5e-4])
    finetune = registry.find("autoregressive_tiny_action_finetune")
    recipe = finetune(str(caches / "long"), str(ends[3]), str(tmp_path / "action"), max_steps=2)
    end = train(recipe)
    with_actions = read_all(nemo_format.open_weights(end))
    assert with_actions["action_embedder.linear_1.weight"].shape == (1, 7)
    assert with_actions["action_embedder.linear_2.bias"].abs().max() > 0  # begins at zero
    finetune = registry.find("autoregressive_tiny_video2world_medusa_finetune")
    recipe = finetune(str(caches / "long"), str(end), str(tmp_path / "medusa"), max_steps=4)
    recipe.model.config.action_dim, recipe.data.with_actions = 7, True
    end = train(recipe)
    with_heads = read_all(nemo_format.open_weights(end))
    heads = with_heads.pop("medusa_heads.linear.weight")
    assert heads.shape == (7 * 80, 80)
    assert heads.view(7, 80, 80).abs().amax(dim=(1, 2)).min() > 0  # all begin at zero
    assert with_heads.keys() == with_actions.keys()
    assert all(torch.equal(with_heads[name], weight) for name, weight in with_actions.items())
    assert CheckpointCard.from_dict(read_json(end / "card.json")).config["num_medusa_heads"] == 7


@pytest.mark.parametrize("source", ["long", "files"])
def test_a_run_resumed_inside_an_epoch_goes_on_as_if_it_had_not_stopped(
    source: str, caches: Path, tmp_path: Path
) -> None:
    """Cache and files hold 6 and 9 training samples, of 2 in a batch; runs go on in the first epoch.

    The second is of Medusa heads alone, on a base without any.
    """
    given: dict[str, str] = {"latents": str(caches / source), "directory": str(tmp_path / "run")}
    name = "autoregressive_tiny_pretrain"
    if source == "files":
        given["base"] = str(train(registry.find(name)(given["latents"], str(tmp_path / "base"), max_steps=2)))
        name = "autoregressive_tiny_medusa_finetune"

    def recipe() -> run.Partial:
        return registry.find(name)(**given, max_steps=5)

    last = train(recipe())
    whole = [row["loss"] for row in rows(last)]
    assert len(whole) == 5
    for lost in (path for path in last.parent.glob("step=*") if "0000002" not in path.name):
        lost.unlink() if lost.is_symlink() else shutil.rmtree(lost)
    again = train(recipe())
    assert again == last
    assert [row["loss"] for row in rows(last)][-3:] == whole[2:]


PUBLISHED = [
    (f"autoregressive_{size}_{stage}", tp, frames)
    for tp, sizes in ((4, ("4b", "5b")), (8, ("12b", "13b")))
    for size, stage, frames in (
        (sizes[0], "pretrain", 3),
        (sizes[0], "long_finetune", 5),
        (sizes[1], "video2world_finetune", 5),
        (sizes[1], "cooldown_finetune", 5),
        (sizes[0], "medusa_finetune", 5),
        (sizes[1], "medusa_finetune", 5),
        (sizes[1], "action_finetune", 5),
    )
]


@pytest.mark.parametrize(("name", "tp", "frames"), PUBLISHED)
def test_published_sizes_fit_their_layout(name: str, tp: int, frames: int) -> None:
    recipe = registry.find(name)()
    trainer, optim, objective = recipe.trainer, recipe.optim, fiddle.build(recipe.model.objective)
    assert (trainer.tp, trainer.sp, trainer.devices, trainer.async_save) == (tp, True, 8, True)
    assert (optim.lr, optim.weight_decay, optim.betas) == (1e-3, 0.05, (0.9, 0.999))
    assert (objective.num_condition_latents_t, objective.z_loss_coeff) == (1, 3e-4)
    decay = "cosine" if "medusa" in name or "action" in name else "constant"
    assert (optim.decay, optim.warmup) == (("linear", 0) if "cooldown" in name else (decay, 5000))
    assert objective.medusa_only == ("medusa" in name)
    if "cooldown" in name:
        assert trainer.max_steps == 30_000
    config = fiddle.build(recipe.model.config)
    assert config.num_medusa_heads == (7 if "medusa" in name else 0)
    assert (config.yarn is not None) == (tp == 8 and frames == 5)
    config.sequence_parallel = True
    length = frames * 40 * 64 + (64 if config.special_tokens else 0)
    assert length in (7680, 12_800, 12_864)
    check_layout(config, tp, 1, 1, length)
    assert recipe.data.global_batch_size == 4 * 8 * trainer.num_nodes // tp


def test_stages_that_cannot_be_are_refused(caches: Path) -> None:
    given = {"latents": "a", "latents_highres": "b", "latents_quality": "c", "directory": "d"}
    with pytest.raises(UserError, match="pictures: got 'p', expected None, for the first stage of 4b takes none"):
        stages_of("4b", **given, pictures="p")
    with pytest.raises(UserError, match=r"size: got '5b', expected one of \['12b', '14b', '4b', '7b', 'auto"):
        stages_of("5b", **given)
    recipe = registry.find("autoregressive_tiny_video2world_finetune")(str(caches / "files"), "nowhere")
    card = read_cache_card(caches / "files")
    model = fiddle.build(recipe.model)(init_from=None)
    model.config.vocab_size = VOCABULARY
    with pytest.raises(UserError, match="text_dim of the cache: got 0, expected 384"):
        model.check_data(card)
