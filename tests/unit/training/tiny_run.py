"""A tiny GPT trained through `nemo_cosmos.training`: imported by tests, and run as a script where they need processes.

python tiny_run.py FOLDER --steps 4 --devices 2 --tp 2
torchrun --nproc-per-node 2 -m tests.unit.training.tiny_run FOLDER --steps 4 --tp 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo import lightning as nl
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import Dataset

from nemo_cosmos.parallel.data_sampler import CosmosDataSampler
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.loss import MeanLossReduction
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer

VOCABULARY, LENGTH, GLOBAL_BATCH = 96, 16, 4


def tiny_config(**overrides: object) -> TransformerConfig:
    """Two layers of width 64; dropout is on, so that tests see wrong random states."""
    values = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.1,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(values | overrides))


def tiny_gpt(config: TransformerConfig) -> GPTModel:
    """The bare Megatron module of this rank."""
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
    )


class _Mean(MeanLossReduction):
    def forward(self, batch: dict, forward_out: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss = forward_out.float().mean()
        return loss, {"avg": loss.detach().clone().reshape(1)}


class TinyModel(pl.LightningModule, nl.io.IOMixin, nl.io.ConnectorMixin):
    """GPT in NeMo's conventions."""

    def __init__(self, config: TransformerConfig | None = None) -> None:
        super().__init__()
        self.config = config or tiny_config()
        self.optim = default_optim(lr=1e-3, max_steps=1)
        self._training_loss_reduction = _Mean()

    def configure_model(self) -> None:
        if not hasattr(self, "module"):
            self.module = tiny_gpt(self.config)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool, device=tokens.device), 1)[None, None]
        return self.module(tokens, positions, mask, labels=labels)

    def data_step(self, dataloader_iter: object) -> dict[str, torch.Tensor]:
        return {name: x.to(current_device()) for name, x in next(dataloader_iter)[0].items()}

    def forward_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self(batch["tokens"], batch["labels"])

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int | None = None) -> torch.Tensor:
        return self.forward_step(batch)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int | None = None) -> torch.Tensor:
        return self.forward_step(batch)

    @property
    def training_loss_reduction(self) -> _Mean:
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> _Mean:
        return self._training_loss_reduction


class _Tokens(Dataset):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        steps = torch.randint(1, 4, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))
        tokens = steps.cumsum(0) % VOCABULARY
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


class TinyData(pl.LightningDataModule):
    """Random walks over the vocabulary."""

    def __init__(self, micro_batch_size: int = 2) -> None:
        super().__init__()
        self.data_sampler = CosmosDataSampler(
            seq_len=LENGTH, micro_batch_size=micro_batch_size, global_batch_size=GLOBAL_BATCH
        )

    def train_dataloader(self) -> WrappedDataLoader:
        return WrappedDataLoader(mode="train", dataset=_Tokens())

    def val_dataloader(self) -> WrappedDataLoader:
        return WrappedDataLoader(mode="validation", dataset=torch.utils.data.Subset(_Tokens(), range(8)))

    def state_dict(self) -> dict[str, int]:
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(steps)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]


class Losses(pl.Callback):
    """Keeps the loss of each step, and may kill the process after one."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.by_step: dict[int, float] = {}
        self._kill_after = kill_after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.by_step[trainer.global_step] = float(trainer.callback_metrics["reduced_train_loss"])
        if trainer.global_step == self._kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: str | Path,
    *,
    steps: int,
    kill_after: int | None = None,
    dropout: float = 0.1,
    keep: int = 2,
    **trainer_arguments: object,
) -> dict[int, float]:
    """Trains (or goes on) in `folder`, saving every second step.

    Returns:
        Loss by step, of the steps that this process made.
    """
    losses = Losses(kill_after)
    callbacks = [losses, *trainer_arguments.pop("callbacks", [])]
    pretrain(
        TinyModel(tiny_config(hidden_dropout=dropout)),
        TinyData(),
        default_trainer(max_steps=steps, callbacks=callbacks, **trainer_arguments),
        log=default_log(folder, save_every=2, keep=keep),
        optim=default_optim(lr=3e-3, max_steps=20, warmup=2),
        resume=default_resume(),
    )
    return losses.by_step


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--kill-after", type=int)
    # torchrun has started the processes already, and tells how many.
    parser.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name in ("tp", "pp", "cp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    arguments = vars(parser.parse_args())
    losses = run(arguments.pop("folder"), **arguments)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print("LOSSES", json.dumps(losses), flush=True)


if __name__ == "__main__":
    _main()
