"""Each cured place of `nemo_cosmos.parallel.cpu`, alone: with all other cures in force it fails without its own."""

from __future__ import annotations

import functools
import importlib
import logging
from types import SimpleNamespace

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.errors import UserError
from nemo_cosmos.parallel import cpu, startup

CPU = torch.device("cpu")
CONFIG = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
DISTRIBUTED_OPTIMIZER = "optimizer.distrib_optimizer:DistributedOptimizer"


@pytest.fixture(autouse=True)
def _groups():
    with startup.initialize():
        yield
    cpu.enable()  # other tests of this process go on with it


def _module(name):
    return importlib.import_module(f"megatron.core.{name}")


class _Line(torch.nn.Module):
    """One linear layer with what Megatron's DDP and schedules ask of a model."""

    config = CONFIG
    model_type = ModelType.encoder_or_decoder

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, dtype=dtype)
        for parameter in self.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
            parameter.main_grad = None

    def forward(self, x):
        return self.linear(x)

    def sharded_state_dict(self):
        state = self.state_dict(keep_vars=True)
        return {name: ShardedTensor.from_rank_offsets(name, value) for name, value in state.items()}

    def set_input_tensor(self, _):
        pass


def _ddp(model, *, distributed_optimizer=True):
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    return DistributedDataParallel(CONFIG, settings, model)


def _optimizer(model=None, *, distributed=True, bf16=False):
    ddp = _ddp(model or _Line(), distributed_optimizer=distributed)
    settings = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=bf16, use_distributed_optimizer=distributed, clip_grad=1e-3
    )
    return ddp, get_megatron_optimizer(settings, [ddp])


def _trained():
    ddp, optimizer = _optimizer()
    _step(ddp, optimizer)
    return ddp, optimizer


def _step(ddp, optimizer):
    ddp.zero_grad_buffer()
    ddp(torch.ones(1, 2)).sum().backward()
    ddp.finish_grad_sync()
    optimizer.step()


def _save_and_load(tmp_path):
    """Loads a trained optimizer's state into a fresh one, and checks that both go on alike."""
    first, second = _trained(), _optimizer(_Line())
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

    def state(ddp, optimizer, **kwargs):
        model = ddp.module.sharded_state_dict()
        return {"model": model, "optimizer": optimizer.sharded_state_dict(model, metadata=metadata, **kwargs)}

    tmp_path.mkdir(exist_ok=True)
    dist_checkpointing.save(state(*first), str(tmp_path))
    loaded = dist_checkpointing.load(state(*second, is_loading=True), str(tmp_path))
    second[0].module.load_state_dict(loaded["model"])
    second[1].load_state_dict(loaded["optimizer"])
    for pair in (first, second, first, second):
        _step(*pair)
    assert torch.equal(first[0].module.linear.weight, second[0].module.linear.weight)


def _forward_backward(tmp_path):
    schedule = _module("pipeline_parallel").get_forward_backward_func()
    schedule(
        forward_step_func=lambda _, model: (model.linear(torch.ones(1, 2)).sum(), lambda x: (x, {})),
        data_iterator=iter([]),
        model=[_Line()],
        num_microbatches=1,
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
    )


def _fork(tmp_path):
    with tensor_parallel.get_cuda_rng_tracker().fork():
        first = torch.rand(1)
    startup.seed_ranks(1234)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.equal(first, torch.rand(1))
    assert not torch.equal(first, torch.rand(1))


def _fork_in_silence(tmp_path):
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addHandler(handler)
    try:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(1)
    finally:
        logger.removeHandler(handler)
    assert not heard


def _column_parallel(tmp_path):
    settings = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, use_cpu_initialization=False)
    layer = tensor_parallel.ColumnParallelLinear(8, 8, config=settings, init_method=torch.nn.init.zeros_)
    assert layer.weight.device == CPU


def _pair():
    """A group that says it has two members, for code that stops at a group of one."""
    return SimpleNamespace(size=lambda: 2, rank=lambda: 0)


def _two_rank_gather(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", lambda output, *_, **__: output.zero_())
        patch.setattr(_module("tensor_parallel.mappings"), "dist_all_gather_func", lambda output, *_, **__: output)
        assert _module("tensor_parallel.mappings")._gather_along_first_dim(torch.ones(2), _pair()).shape == (4,)


def _receive_buffers(tmp_path):
    module = _module("pipeline_parallel.p2p_communication")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_process_group_ranks", lambda _: [0, 0], raising=False)
        communicator = module.P2PCommunicator.__new__(module.P2PCommunicator)
        communicator.config = SimpleNamespace(
            pipeline_dtype=torch.float32,
            variable_seq_lengths=False,
            use_ring_exchange_p2p=False,
            batch_p2p_comm=True,
            batch_p2p_sync=True,
        )
        communicator.pp_group, communicator.next_rank, communicator.prev_rank = _pair(), 0, 0
        communicator.virtual_pipeline_model_parallel_size = None
        patch.setattr(module, "_batched_p2p_ops", lambda **_: [])
        _, received, _ = communicator._communicate(
            tensor_send_next=None, tensor_send_prev=None, recv_prev=False, recv_next=True, tensor_shape=(2, 1, 8)
        )
    assert received.shape == (2, 1, 8)


def _key_value_cache(tmp_path):
    attention = SimpleNamespace(num_query_groups_per_partition=2, hidden_size_per_attention_head=4)
    cache = _module("transformer.attention").Attention._allocate_memory(attention, 3, 1, 4, torch.float32)
    assert cache.shape == (3, 1, 2, 4)


def _exchange(tmp_path):
    """Two shards of a tensor, of which this rank has loaded one and another rank is said to need it too."""
    module = _module("dist_checkpointing.exchange_utils")
    shard = ShardedTensor.from_rank_offsets("a", torch.ones(2))
    key = module._sharded_tensor_shard_id(shard)
    plan = module.ShardDistribution(
        main_rank_for_shard={key: 0},
        shards_in_this_group={key},
        shard_to_metadata={key: shard},
        all_ranks_for_shard={key: [0, 1]},
    )
    loaded = _module("dist_checkpointing.strategies.fully_parallel").exchange_by_distribution(
        {key: torch.ones(2)}, {}, plan, parallel_state.get_data_parallel_group(), "broadcast"
    )
    assert torch.equal(loaded[key], torch.ones(2))
    return module.exchange_by_distribution({key: torch.ones(2)}, {}, plan, dist.group.WORLD, "broadcast")


def _exchange_buffer(tmp_path):
    module = _module("dist_checkpointing.exchange_utils")
    shard = ShardedTensor.from_rank_offsets("a", torch.ones(2))
    tensor, _ = module._get_empty_tensor_for_exchange("a", {"a": shard}, {}, {})
    assert tensor.device == CPU


def _init_data(tmp_path):
    shard = ShardedTensor.from_rank_offsets("a", torch.ones(2)).without_data()
    shard.init_data("cuda")
    assert shard.data.device == CPU


def _fully_parallel_load(tmp_path):
    module = _module("dist_checkpointing.strategies.fully_parallel")
    strategies = _module("dist_checkpointing.serialization")
    tmp_path.mkdir(exist_ok=True)
    dist_checkpointing.save({"a": ShardedTensor.from_rank_offsets("a", torch.ones(2))}, str(tmp_path))
    wrapper = module.FullyParallelLoadStrategyWrapper(
        strategies.get_default_load_sharded_strategy(str(tmp_path)), _pair()
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("exchange_by_distribution", lambda loaded, *_: loaded),
            ("exchange_loaded_objects_gather_object", lambda objects: objects),
        ):
            patch.setattr(module, name, value)
        patch.setattr(wrapper, "apply_loading_parallelization", lambda _: "a plan")
        patch.setattr(wrapper, "_defer_loading_sharded_tensors", lambda s: ({}, {}, s, {}))
        patch.setattr(wrapper, "_defer_loading_sharded_objects", lambda _: ({}, {}, {}, {}))
        wrapper.load({"a": ShardedTensor.from_rank_offsets("a", torch.zeros(2))}, tmp_path)


def _save_flags(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    dist_checkpointing.save({"a": ShardedTensor.from_rank_offsets("a", torch.ones(2))}, str(tmp_path))


def _rotary(tmp_path):
    module = _module("models.common.embeddings.rotary_pos_embedding")
    rotary = module.RotaryEmbedding(kv_channels=4, rotary_percent=1.0, use_cpu_initialization=True)
    assert rotary(3).shape == (3, 1, 1, 4)


def _rope_index(name, tmp_path):
    part = _module(f"models.common.embeddings.{name}").get_pos_emb_on_this_cp_rank(
        torch.ones(4, 1), 0, dist.group.WORLD
    )
    assert part.shape == (4, 1)


def _clip(name, tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 4.0)
    _module(name).clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=4.0)
    assert weight.grad.tolist() == pytest.approx([1.0, 1.0])


def _nan_message(tmp_path):
    machine = _module("rerun_state_machine").RerunStateMachine()
    with pytest.raises(RuntimeError, match="not finite"):
        machine.validate_result(
            result=torch.tensor(float("nan")), rejection_func=torch.isnan, message="not finite", fatal=True
        )


EXERCISES = {
    "tensor_parallel.mappings:torch": _two_rank_gather,
    "tensor_parallel.layers:torch": _column_parallel,
    "tensor_parallel.utils:torch": lambda _: _module("tensor_parallel.utils").gather_split_1d_tensor(torch.ones(2)),
    "tensor_parallel.random:torch": lambda _: startup.seed_ranks(1),
    "tensor_parallel.random:_set_cuda_rng_state": _fork,
    "tensor_parallel.random:CudaRNGStatesTracker.fork": _fork_in_silence,
    "pipeline_parallel.p2p_communication:torch": _receive_buffers,
    "pipeline_parallel.schedules:torch": _forward_backward,
    "distributed.param_and_grad_buffer:torch": lambda _: _ddp(_Line()),
    "optimizer.optimizer:torch": lambda _: _optimizer(distributed=False),
    "optimizer.clip_grads:torch": lambda _: _module("optimizer.clip_grads").get_grad_norm_fp32(
        torch.ones(2), grad_stats_parallel_group=dist.group.WORLD
    ),
    "optimizer.clip_grads:clip_grad_by_total_norm_fp32": functools.partial(_clip, "optimizer.clip_grads"),
    "optimizer.optimizer:clip_grad_by_total_norm_fp32": functools.partial(_clip, "optimizer.optimizer"),
    "optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": lambda _: _optimizer(
        _Line(torch.bfloat16), distributed=False, bf16=True
    ),
    "optimizer.distrib_optimizer:torch": _save_and_load,
    f"{DISTRIBUTED_OPTIMIZER}._build_model_and_main_param_groups": lambda _: _optimizer(),
    f"{DISTRIBUTED_OPTIMIZER}.get_parameter_state_dp_zero": _save_and_load,
    f"{DISTRIBUTED_OPTIMIZER}.sharded_state_dict": _save_and_load,
    f"{DISTRIBUTED_OPTIMIZER}.load_state_dict": _save_and_load,
    f"{DISTRIBUTED_OPTIMIZER}._set_main_param_and_optimizer_states": _save_and_load,
    "models.common.embeddings.rotary_pos_embedding:torch": _rotary,
    "models.common.embeddings.rope_utils:torch": functools.partial(_rope_index, "rope_utils"),
    "models.common.embeddings.rope_utils:get_pos_emb_on_this_cp_rank": functools.partial(_rope_index, "rope_utils"),
    "models.common.embeddings.rotary_pos_embedding:get_pos_emb_on_this_cp_rank": functools.partial(
        _rope_index, "rotary_pos_embedding"
    ),
    "transformer.attention:torch": _key_value_cache,
    "dist_checkpointing.mapping:ShardedTensor.init_data": _init_data,
    "dist_checkpointing.exchange_utils:torch": _exchange_buffer,
    "dist_checkpointing.exchange_utils:exchange_by_distribution": _exchange,
    "dist_checkpointing.strategies.fully_parallel:exchange_by_distribution": _exchange,
    "dist_checkpointing.strategies.fully_parallel:torch": _fully_parallel_load,
    "dist_checkpointing.strategies.filesystem_async:torch": _save_flags,
    "dist_checkpointing.strategies.async_utils:torch": lambda _: (
        _module("dist_checkpointing.strategies.async_utils").TemporalAsyncCaller().sync_all_async_calls(0)
    ),
    "dist_checkpointing.strategies.state_dict_saver:torch": _save_flags,
    "rerun_state_machine:torch": _nan_message,
    "timers:torch": lambda _: _module("timers").Timers(2, "minmax")("span", log_level=0).start(),
    "utils:torch": lambda _: _module("utils").local_multi_tensor_l2_norm(1, None, [[torch.ones(2)]], False),
}


def _original(site):
    """What stood at a cured place before: the owner, the name and the value."""
    module, _, qualified_name = site.partition(":")
    *path, name = qualified_name.split(".")
    owner = functools.reduce(getattr, path, _module(module))
    cpu.disable()
    value = vars(owner)[name]
    cpu.enable()
    return owner, name, value


def test_every_cured_place_is_exercised():
    cpu.disable()
    cpu.enable()
    assert {site.removeprefix("megatron.core.") for site in cpu._patches.applied} == set(EXERCISES)


@pytest.mark.parametrize("site", EXERCISES)
def test_a_cured_place_works_and_fails_without_its_cure(site, tmp_path, monkeypatch):
    EXERCISES[site](tmp_path / "with")
    monkeypatch.setattr(*_original(site))
    with pytest.raises(Exception):  # noqa: B017 - each place fails in its own way
        EXERCISES[site](tmp_path / "without")


def test_disable_puts_everything_back():
    cpu.disable()
    before = {site: _value(site) for site in EXERCISES}
    cpu.enable()
    assert all(_value(site) is not before[site] for site in EXERCISES)
    cpu.enable()
    cpu.disable()
    assert all(_value(site) is before[site] for site in EXERCISES)
    cpu.disable()


def _value(site):
    module, _, qualified_name = site.partition(":")
    *path, name = qualified_name.split(".")
    return vars(functools.reduce(getattr, path, _module(module)))[name]


def test_torch_itself_is_left_alone():
    functions = (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type, torch.tensor, torch.Tensor.to)
    cpu.enable()
    _trained()
    assert functions == (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type, torch.tensor, torch.Tensor.to)
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="CUDA is available"):
        cpu.enable()


def test_another_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(megatron.core, "__version__", "0.16.1")
    with pytest.raises(UserError, match=r"megatron-core: got '0\.16\.1', expected version 0\.15\.x\. Run: pip install"):
        cpu.enable()


def test_other_devices_pass_through():
    host = _module("utils").torch
    assert host.empty(1, device="meta").device.type == "meta"
    assert host.empty(1, device=None).device == CPU
    assert host.cuda.FloatTensor is torch.cuda.FloatTensor
