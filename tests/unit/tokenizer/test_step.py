import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from nemo.lightning.data import WrappedDataLoader

from nemo_cosmos.data.datamodule import VideoClipDataModule
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.parallel.data_sampler import CosmosDataSampler
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig, preset
from nemo_cosmos.tokenizer.losses import LossConfig, WeightSchedule, psnr_db
from nemo_cosmos.tokenizer.megatron_model import MegatronVideoTokenizer
from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
from nemo_cosmos.tokenizer.step import TokenizerModel
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_trainer
from tests.unit.tokenizer.conftest import ODD, random_tokenizer

MINI = TokenizerConfig(channels=8, channels_mult=(1, 1, 1), num_res_blocks=1, latent_channels=4)
STEPS = 3
LATER = WeightSchedule(values=(0.0, 0.1), boundaries=(1,))


def clip(index: int, num_frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.rand(3, 1, 1, 1, generator=generator).expand(3, num_frames, 16, 16).contiguous() * 2 - 1


class Clips(torch.utils.data.Dataset):
    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"video": clip(index, self.num_frames)}


class ClipData(pl.LightningDataModule):
    def __init__(self, num_frames: int = 9) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.data_sampler = CosmosDataSampler(seq_len=9, micro_batch_size=2, global_batch_size=4)

    def train_dataloader(self) -> WrappedDataLoader:
        return WrappedDataLoader(mode="train", dataset=Clips(self.num_frames))

    def val_dataloader(self) -> WrappedDataLoader:
        return WrappedDataLoader(mode="validation", dataset=Clips(self.num_frames))


class Metrics(pl.Callback):
    def __init__(self) -> None:
        self.train: list[dict[str, float]] = []
        self.validation: dict[str, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.train.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.validation = {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MegatronVideoTokenizer, Metrics, Path]:
    """Three real steps of NeMo's trainer on the CPU from given weights, with one validation."""
    folder = tmp_path_factory.mktemp("tokenizer")
    start = weights.save(random_tokenizer(MINI), folder / "start")
    model = TokenizerModel(TokenizerModelConfig(architecture=MINI, init_from=str(start)))
    metrics = Metrics()
    run = pretrain(
        model,
        ClipData(),
        default_trainer(max_steps=STEPS, val_every=STEPS, val_batches=2, callbacks=[metrics]),
        log=default_log(folder / "run"),
        optim=default_optim(lr=1e-3, max_steps=20),
    )
    module = model.module
    while not isinstance(module, MegatronVideoTokenizer):
        module = module.module
    return module, metrics, run


def expected_metrics(global_step: int) -> tuple[float, float]:
    """L1 and PSNR of the global batch, before any step."""
    video = torch.stack([clip(4 * global_step + i) for i in range(4)])
    with torch.no_grad():
        error = random_tokenizer(MINI)(video).clamp(-1, 1) - video
        l1 = (random_tokenizer(MINI)(video) - video).abs().mean()
    return l1.item(), psnr_db(error.square().mean()).item()


def test_logs_loss_l1_and_psnr_of_the_whole_batch(trained: tuple) -> None:
    _, metrics, _ = trained
    assert len(metrics.train) == STEPS
    l1, psnr = expected_metrics(0)
    assert metrics.train[0]["l1"] == pytest.approx(l1, rel=1e-5)
    assert metrics.train[0]["reduced_train_loss"] == pytest.approx(l1, rel=1e-5)
    assert metrics.train[0]["psnr_db"] == pytest.approx(psnr, rel=1e-5)
    assert metrics.validation["val_l1"] == metrics.validation["val_loss"]
    assert metrics.validation["val_psnr_db"] > psnr


def test_weights_move_and_the_loss_falls(trained: tuple) -> None:
    module, metrics, _ = trained
    start = random_tokenizer(MINI)
    assert module.fingerprint() != start.fingerprint()
    video = torch.stack([clip(i) for i in range(12)])
    with torch.no_grad():
        assert (module(video) - video).abs().mean() < (start(video) - video).abs().mean()


def test_a_distributed_checkpoint_holds_every_weight(trained: tuple) -> None:
    from megatron.core import dist_checkpointing

    module, _, run = trained
    (checkpoint,) = (run / "checkpoints").glob(f"step={STEPS:07d}/weights")
    saved = dist_checkpointing.load_plain_tensors(str(checkpoint))
    for name, weight in module.state_dict().items():
        assert torch.equal(saved[f"module.{name}"], weight), name


def test_sharded_names_are_the_weights_names(trained: tuple) -> None:
    module, _, _ = trained
    assert list(module.sharded_state_dict(prefix="module.")) == [f"module.{name}" for name in module.state_dict()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"tensor_model_parallel_size: got 3, .*channels.*would do: 2"),
        ({"pipeline_model_parallel_size": 3}, r"pipeline_model_parallel_size: got \(3, None\), expected 1, or 2"),
        ({"virtual_pipeline_model_parallel_size": 2}, "without virtual stages"),
        ({"sequence_parallel": True}, "sequence_parallel: got True"),
        ({"context_parallel_axis": "width"}, "context_parallel_axis: got 'width', expected 'height' or 'time'"),
        ({"pipeline_model_parallel_size": 2, "freeze_encoder": True}, "freeze_encoder: got True"),
    ],
)
def test_impossible_layouts_are_refused_before_anything_is_built(
    fields: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Conv3d, "__init__", lambda *_, **__: pytest.fail("weights were allocated"))
    config = TokenizerModelConfig(architecture=MINI)
    for name, value in fields.items():  # as the strategy does it
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        config.configure_model()


def test_an_adversary_of_two_stages_is_refused() -> None:
    model = TokenizerModel(TokenizerModelConfig(architecture=MINI), adversary=SimpleNamespace(name="any"))
    model.config.pipeline_model_parallel_size = 2
    with pytest.raises(UserError, match="adversary"):
        model.configure_model()


def test_a_frozen_encoder_leaves_the_latents_alone() -> None:
    tokenizer = TokenizerModelConfig(architecture=MINI, freeze_encoder=True).configure_model()
    trained = {name.split(".")[0] for name, weight in tokenizer.named_parameters() if weight.requires_grad}
    assert trained == {"post_quant_conv", "decoder"}


def test_start_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = weights.save(random_tokenizer(ODD), tmp_path / "odd")
    with pytest.raises(UserError, match="init_from"):
        TokenizerModelConfig(architecture=MINI, init_from=str(folder)).configure_model()


@pytest.mark.parametrize("form", ["nemo", "diffusers", "published", "safetensors"])
def test_start_weights_may_stand_in_any_form(form: str, tmp_path: Path) -> None:
    from nemo_cosmos.checkpoints.convert import convert

    architecture = TokenizerConfig(channels=8, channels_mult=(1, 1), num_res_blocks=1, patch_size=8, latent_channels=4)
    folder = weights.save(random_tokenizer(architecture), tmp_path / "start")
    place = tmp_path / ("start.safetensors" if form == "safetensors" else form)
    if form == "published":
        convert(folder, place / "model.pt", to="reference")
        write_json(place / "config.json", architecture.to_dict())
    else:
        convert(folder, place, to=form)
    module = TokenizerModelConfig(architecture=architecture, init_from=str(place)).configure_model()
    for name, weight in random_tokenizer(architecture).state_dict().items():
        assert torch.equal(module.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("layout", "data", "message"),
    [
        ({}, {"num_frames": 10}, "number of frames: got 10"),
        ({"context_parallel_size": 3}, {}, "height of the picture: got 16, .*Use 2 of them"),
        (
            {"context_parallel_size": 2, "context_parallel_axis": "time"},
            {"num_frames": 17, "pictures_every": 2},
            "time of the picture: got 1,",
        ),
        (
            {"context_parallel_size": 2, "context_parallel_axis": "time", "loss": LossConfig(consistency_weight=LATER)},
            {"num_frames": 17},
            "time of the picture: got 9,",
        ),
        ({"context_parallel_axis": "width"}, {}, "context_parallel_axis: got 'width'"),
    ],
)
def test_sizes_that_do_not_suit_the_layout_are_refused(
    layout: dict[str, object], data: dict[str, int], message: str
) -> None:
    model = TokenizerModel(TokenizerModelConfig(architecture=MINI))
    for name, value in layout.items():  # as the strategy does it
        setattr(model.config, name, value)
    clips = VideoClipDataModule("anywhere", **{"num_frames": 9, "height": 16, "width": 16, **data})
    model._trainer = SimpleNamespace(datamodule=clips)
    with pytest.raises(UserError, match=message):
        model.setup("fit")


def test_sizes_are_looked_at_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Conv3d, "__init__", lambda *_, **__: pytest.fail("weights were allocated"))
    model, clips = TokenizerModel(TokenizerModelConfig(architecture=MINI)), VideoClipDataModule("anywhere", height=20)
    trainer = default_trainer(max_steps=1)
    with pytest.raises(UserError, match="height: got 20"):
        pretrain(model, clips, trainer, log=default_log(tmp_path), optim=default_optim(lr=1e-3, max_steps=20))


def test_a_tokenizer_of_images_takes_single_frames() -> None:
    config = TokenizerModelConfig(architecture=preset("CI8x8-tiny"))
    config.check_size(1, 64, 64)
    with pytest.raises(UserError, match="num_frames: got 17, expected 1 for a tokenizer of images"):
        config.check_size(17, 64, 64)
    with pytest.raises(UserError, match="height: got 60"):
        config.check_size(1, 60, 64)


@pytest.mark.parametrize(
    ("loss", "architecture", "message"),
    [
        ({"consistency_weight": 0.1, "consistency_frames": 12}, MINI, r"frames: got 12, .*1 \+ a multiple of 8.*is 9"),
        ({"consistency_weight": 0.1, "consistency_frames": 2}, MINI, "frames: got 2, .*The nearest is 9"),
        ({"consistency_weight": 0.1}, preset("DI8x8-tiny"), "consistency_weight: got 0.1, expected 0 for images"),
        ({"flow_weight": LATER}, preset("CI8x8-tiny"), "flow_weight: got .*, expected 0 for images"),
    ],
)
def test_terms_that_a_tokenizer_cannot_have_are_refused(
    loss: dict[str, object], architecture: TokenizerConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TokenizerModelConfig(architecture=architecture, loss=LossConfig(**loss))


def test_windows_are_coded_alone_joined_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that adds a constant of its own to each window."""
    loss = LossConfig(consistency_weight=1.0, consistency_frames=9, consistency_stride=8)
    model = TokenizerModel(TokenizerModelConfig(architecture=MINI, loss=loss))
    monkeypatch.setattr(model, "_steps_made", lambda: 0)
    reduction = model.training_loss_reduction
    monkeypatch.setattr(reduction, "step", lambda: 0)
    video = torch.rand(2, 3, 18, 8, 8)
    offsets = torch.tensor([0.1, 0.3, 0.1, 0.3]).view(-1, 1, 1, 1, 1)
    monkeypatch.setattr(model, "module", lambda windows: windows + offsets, raising=False)
    batch = {"video": video}
    total, parts = reduction.forward(batch, model.forward_step(batch))
    # Frames 0-8 and 8-16: frame 8 is in both and their mean, frame 17 in none.
    l1 = (8 * 0.1 + 0.2 + 8 * 0.3) / 17
    assert parts["l1"].item() == pytest.approx(l1, rel=1e-5)
    assert parts["consistency"].item() == pytest.approx(0.2, rel=1e-5)
    assert total.item() == pytest.approx(l1 + 0.2, rel=1e-5)


def test_samples_of_pictures_come_to_stand_on_the_batch_axis() -> None:
    model = TokenizerModel(TokenizerModelConfig(architecture=MINI))
    pictures = torch.rand(2, 4, 3, 1, 8, 8)
    batch = model.data_step(iter([{"video": pictures}]))
    assert batch["video"].shape == (8, 3, 1, 8, 8)
    assert torch.equal(batch["video"][5], pictures[1, 1])


def test_figures_of_each_step_are_written_beside_the_columns(trained: tuple) -> None:
    _, metrics, run = trained
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["l1"] for row in rows] == [step["l1"] for step in metrics.train]
    assert all("psnr_db" in row and "val_l1" not in row for row in rows)
