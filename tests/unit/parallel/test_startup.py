import os
from multiprocessing.managers import BaseProxy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import startup


def test_a_single_process_needs_no_launcher_and_leaves_nothing_open():
    with startup.initialize() as device:
        assert dist.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_groups_are_closed_after_an_error():
    with pytest.raises(RuntimeError, match="mine"), startup.initialize():
        raise RuntimeError("mine")
    assert not dist.is_initialized()


def test_open_groups_of_the_same_layout_are_used_and_left_open():
    with startup.initialize(seed=1):
        with startup.initialize(seed=2):
            first = torch.rand(1)
        assert dist.is_initialized()
        assert parallel_state.model_parallel_is_initialized()
        startup.seed_ranks(2)
        assert torch.equal(torch.rand(1), first)


def test_the_next_layout_closes_the_groups_of_the_one_before():
    def sockets() -> int:
        return sum(link.is_symlink() and "socket" in os.readlink(link) for link in Path("/proc/self/fd").iterdir())

    with startup.initialize():
        opened = []
        for _ in range(3):
            startup.end_model_parallel()
            with startup.initialize():
                opened.append(sockets())
    assert opened[0] == opened[1] == opened[2]


def test_shutdown_ends_what_is_open_and_may_be_called_twice():
    with startup.initialize():
        startup.end_model_parallel()
        assert dist.is_initialized()
        with startup.initialize():
            pass
    startup.shutdown()
    startup.shutdown()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 2}, "got 1, expected a multiple of tensor x pipeline x context = 2 x 1 x 1 = 2. Start 2 processes"),
        ({"pipeline": 2, "context": 3}, "1 x 2 x 3 = 6. Start 6 processes"),
        ({"tensor": 0}, "tensor-parallel size: got 0, expected 1 or more"),
    ],
)
def test_impossible_layouts_are_refused(sizes, message):
    with pytest.raises(UserError, match=message), startup.initialize(**sizes):
        pass
    assert not dist.is_initialized()


def test_the_next_possible_number_of_processes_is_named():
    with pytest.raises(UserError, match="Start 8 processes"):
        startup.check_layout(6, tensor=2, pipeline=2, context=1)
    startup.check_layout(8, tensor=2, pipeline=2, context=1)


def test_saves_that_run_at_once_have_queues_of_their_own(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    startup.save_checkpoints_in_process()
    queues = []
    for _ in range(2):
        startup.save_next_checkpoint_apart()
        queues.append(filesystem_async._get_write_results_queue())
    assert all(isinstance(queue, BaseProxy) for queue in queues)  # that writers in processes of their own can reach
    queues[1].put("results of the second")
    assert queues[0].empty() and queues[1].get_nowait() == "results of the second"
