"""The adversarial stage: a discriminator that is trained beside the tokenizer.

Megatron's strategy trains one model by one optimizer. The discriminator needs neither its parallel layers nor its
schedules: it is small, and the same on every rank. So it stays outside of Megatron, as a callback that the
LightningModule brings along, with a torch optimizer of its own:

- in each micro-batch the loss reduction asks it for the tokenizer's adversarial term, and then lets it learn from the
  same videos, which adds to its own gradients;
- when Megatron has run the step's micro-batches, gradients are averaged over these and over the data-parallel ranks,
  and the optimizer steps; the tokenizer's step comes after, with gradients from the discriminator as it was before;
- weights and optimizer state stand beside each checkpoint, and a resumed run goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from nemo.lightning.megatron_parallel import MegatronStep
from torch import Tensor

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import written_aside
from nemo_cosmos.parallel.replicated import average_gradients
from nemo_cosmos.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator3d
from nemo_cosmos.tokenizer.losses import Weight, weight_at
from nemo_cosmos.tokenizer.perceptual import step_generator
from nemo_cosmos.tokenizer.weights import read_tensors, write_tensors

STATE_FILE = "discriminator.safetensors"
"""Beside `weights` in a checkpoint."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Adversary(pl.Callback):
    """Hinge losses of tokenizer and discriminator, and the discriminator's training.

    Give the weight a schedule that begins with 0 for a warm start: the discriminator learns from the first step on,
    and the tokenizer hears of it only once it has learnt something. The weight is no ratio of gradients, as VQGAN's
    adaptive one, which would differ from micro-batch to micro-batch.

    The optimizer's values are the published ones; the published code has the optimizer, but no discriminator.

    Args:
        config: Sizes of the discriminator.
        weight: Of the tokenizer's adversarial term.
        lr: Adam's learning rate, reached after `warmup` steps and held.
        betas: Adam's decay rates.
        weight_decay: Decoupled.
        warmup: Steps of linear warm-up.
        num_frames: It sees so many consecutive frames, the same for all videos of a step.
        seed: Of its first weights.

    Source: Lim and Ye 2017, arXiv 1705.02894 (hinge loss); cosmos-predict1, `FusedAdamDiscConfig`.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        *,
        weight: Weight,
        lr: float = 4e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.01,
        warmup: int = 5000,
        num_frames: int = 17,
        seed: int = 1234,
    ) -> None:
        if num_frames < 1:
            raise user_error("num_frames", num_frames, "at least 1", "Raise it.")
        self._weight, self._lr, self._warmup, self._num_frames = weight, lr, warmup, num_frames
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = PatchDiscriminator3d(config)
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, eps=1e-8
        )
        num_parameters = sum(parameter.numel() for parameter in self.discriminator.parameters())
        self.name = f"{type(self.discriminator).__name__} of {num_parameters:,} parameters"
        self._autocast = False
        self._num_micro_batches = 0

    def losses(self, reconstruction_BCTHW: Tensor, video_BCTHW: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """The tokenizer's term for a micro-batch; the discriminator's gradients of it are added up on the way.

        Args:
            reconstruction_BCTHW: What the tokenizer made, float [B, C, T, H, W].
            video_BCTHW: What it should be, the same shape.
            step: Optimizer steps made.

        Returns:
            The weighted adversarial term, differentiable in the reconstruction; the discriminator's loss, detached.
        """
        span = self._drawn_span(video_BCTHW.shape[2])
        fake, real = reconstruction_BCTHW[:, :, span], video_BCTHW[:, :, span]
        weight = weight_at(self._weight, step)
        term = -self._logits(fake, learn=False).mean() * weight if weight > 0 else fake.new_zeros(())
        loss = (F.relu(1 - self._logits(real)).mean() + F.relu(1 + self._logits(fake.detach())).mean()) / 2
        loss.backward()
        self._num_micro_batches += 1
        return term, loss.detach()

    def on_megatron_microbatches_end(self, step: MegatronStep) -> None:
        """One step of the discriminator's optimizer, where the micro-batches were for training."""
        if step.forward_only or not self._num_micro_batches:
            return
        average_gradients(self.discriminator.parameters(), num_micro_batches=self._num_micro_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * min(1.0, (step.step_i + 1) / max(self._warmup, 1))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.discriminator.iterate_power()
        self._num_micro_batches = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the discriminator to this rank's device."""
        self.discriminator.to(trainer.strategy.root_device)
        self._autocast = pl_module.config.bf16

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on from the checkpoint that the trainer resumed."""
        if trainer.ckpt_path is not None:
            # NeMo names the folder of the weights inside the checkpoint.
            self.load(Path(trainer.ckpt_path).parent / STATE_FILE)

    def write_beside_checkpoint(self, trainer: pl.Trainer, directory: Path) -> None:
        """Called by the strategy while the checkpoint still counts as unfinished."""
        if trainer.is_global_zero:
            with written_aside(directory / STATE_FILE) as aside:
                write_tensors(aside, self._state())

    def load(self, path: Path) -> None:
        """Reads weights and optimizer state.

        Raises:
            UserError: There are none, or they are of another discriminator.
        """
        if not path.is_file():
            raise UserError(f"{path}: the resumed checkpoint has no discriminator. Start this stage as a new run.")
        saved = read_tensors(path)
        expected = self._state()
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        if (found := {name: tuple(tensor.shape) for name, tensor in saved.items()}) != shapes:
            differing = sorted(set(found.items()) ^ set(shapes.items()))
            raise user_error("discriminator", differing[0], "the sizes of the resumed run", "Correct its config.")
        for name, tensor in expected.items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def _state(self) -> dict[str, Tensor]:
        """Weights, power iteration and Adam's state by name; the tensors themselves, so that they can be written to."""
        state: dict[str, Any] = {f"discriminator.{name}": t for name, t in self.discriminator.state_dict().items()}
        for name, parameter in self.discriminator.named_parameters():
            adam = self.optimizer.state[parameter]
            if not adam:  # as Adam itself begins
                adam |= {"step": torch.tensor(0.0), **{moment: torch.zeros_like(parameter) for moment in _MOMENTS}}
            state |= {f"{key}.{name}": adam[key] for key in ("step", *_MOMENTS)}
        return state

    def _logits(self, video_BCTHW: Tensor, *, learn: bool = True) -> Tensor:
        self.discriminator.requires_grad_(learn)
        with torch.autocast(video_BCTHW.device.type, torch.bfloat16, enabled=self._autocast):
            return self.discriminator(video_BCTHW).float()

    def _drawn_span(self, length: int) -> slice:
        start = int(torch.randint(max(length - self._num_frames, 0) + 1, (), generator=step_generator()))
        return slice(start, start + self._num_frames)
