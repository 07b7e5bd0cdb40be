from types import SimpleNamespace

import pytest
import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.lightning.data import WrappedDataLoader
from nemo.utils import AppState

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.data_sampler import CosmosDataSampler


@pytest.fixture(autouse=True)
def _one_rank():
    AppState().data_parallel_size = 1
    with startup.initialize():
        yield


def _sampler(step=0, **settings):
    sampler = CosmosDataSampler(**({"seq_len": 8, "micro_batch_size": 2, "global_batch_size": 4} | settings))
    sampler.connect(SimpleNamespace(global_step=step))
    return sampler


def _indices(sampler, mode):
    loader = WrappedDataLoader(mode=mode, dataset=torch.arange(12))
    return [batch[0] if isinstance(batch, tuple) else batch for batch in sampler.transform_dataloader(loader)]


def test_training_goes_on_after_the_consumed_samples():
    batches = _indices(_sampler(init_consumed_samples=4), "train")
    assert [batch.tolist() for batch in batches] == [[4, 5], [6, 7], [8, 9], [10, 11]]


def test_validation_always_starts_at_the_first_sample():
    batches = _indices(_sampler(init_consumed_samples=4), "validation")
    assert batches[0].tolist() == [0, 1]


def test_samples_are_counted_on_over_a_resume():
    sampler = _sampler(step=5, init_consumed_samples=20)
    sampler.transform_dataloader(WrappedDataLoader(mode="train", dataset=torch.arange(40)))
    sampler.trainer.global_step = 7
    assert sampler.compute_consumed_samples(sampler.trainer.global_step - sampler.init_global_step) == 28


def test_a_second_training_in_the_process_sets_its_own_micro_batches():
    _sampler().setup(0)
    assert get_num_microbatches() == 2
    _sampler(micro_batch_size=1, global_batch_size=8).setup(0)
    assert get_num_microbatches() == 8


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="a multiple of micro_batch_size x data-parallel ranks = 3 x 1"):
        _sampler(micro_batch_size=3).setup(0)
