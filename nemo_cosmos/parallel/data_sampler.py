"""Hands each data-parallel rank its micro-batches, in an order that survives interruption.

    sampler = CosmosDataSampler(seq_len=768, micro_batch_size=2, global_batch_size=16)

A data module makes one in its constructor and keeps it as `self.data_sampler`; the strategy finds it there. The
sampler walks the training set in the order of its indices, global batch after global batch, starting at
`init_consumed_samples`; shuffling is the data set's affair. Loaders must carry `mode` (`train`, `validation`, `test`
or `predict`; `nemo.lightning.data.WrappedDataLoader` does): all but `train` start at sample 0 each time.
"""

from __future__ import annotations

from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator, update_num_microbatches
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from nemo.utils import AppState
from torch.utils.data import DataLoader

from nemo_cosmos.errors import user_error


class CosmosDataSampler(MegatronDataSampler):
    """`MegatronDataSampler` for any device, that also counts right after a resume.

    Args:
        seq_len: Tokens per sample; pipeline stages size their receive buffers by it.
        micro_batch_size: Samples per forward pass and data-parallel rank.
        global_batch_size: Samples per optimizer step over all ranks.
        init_consumed_samples: Training samples to skip; a resumed run sets it from its checkpoint.
        output_log: Log `consumed_samples` and `global_batch_size` as metrics.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        micro_batch_size: int,
        global_batch_size: int,
        init_consumed_samples: int = 0,
        output_log: bool = True,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            init_consumed_samples=init_consumed_samples,
            output_log=output_log,
        )

    def setup(self, global_rank: int) -> None:
        """Sets Megatron's count of micro-batches per step.

        Raises:
            UserError: The global batch does not divide into micro-batches over the data-parallel ranks.
        """
        ranks = AppState().data_parallel_size
        if self.global_batch_size % (self.micro_batch_size * ranks):
            raise user_error(
                "global_batch_size",
                self.global_batch_size,
                f"a multiple of micro_batch_size x data-parallel ranks = {self.micro_batch_size} x {ranks}",
                "Change one of the three.",
            )
        # One process may train several models in turn; Megatron keeps the first one's counts otherwise.
        unset_num_microbatches_calculator()
        super().setup(global_rank)

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """Gives the loader this rank's micro-batches; training starts after `init_consumed_samples`."""
        if getattr(dataloader, "mode", "train") == "train":
            # Consumed samples are counted from here: the trainer has restored its step, and we our start, by now.
            self.init_global_step = self.trainer.global_step
        return super().transform_dataloader(dataloader, consumed_samples)

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Samples consumed by all ranks since training began.

        Args:
            steps_since_resume: Optimizer steps since this process started or resumed.
        """
        return self.init_consumed_samples + steps_since_resume * self.global_batch_size

    def on_megatron_step_end(self, step: MegatronStep) -> None:
        """Logs the batch counters. NeMo's own version pins memory and moves them to CUDA."""
        if not (self.output_log and step.trainer and step.trainer.training):
            return
        consumed = self.compute_consumed_samples(step.trainer.global_step + 1 - self.init_global_step)
        self.prev_consumed_samples = consumed
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)
        step.pl_module.log("consumed_samples", float(consumed), prog_bar=True, batch_size=1)
        step.pl_module.log("global_batch_size", float(self.global_batch_size), prog_bar=True, batch_size=1)
