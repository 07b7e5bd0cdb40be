"""Lets Megatron-core 0.15 (and NeMo Lightning's use of it) run on a CPU over gloo, without forking either.

Megatron-core names CUDA in places where it means "the device of this rank". `enable()` cures exactly the places
below and `disable()` puts everything back; nothing in `torch` itself stays changed. Where CUDA is available `enable()`
raises: there Megatron must run as it was written, but for what `enable_torch_adam()` cures.

Three remedies are used:

- proxy: inside one module the name `torch` is bound to a stand-in that differs from `torch` in two points:
  `torch.cuda` answers for the host (`current_device()` is `cpu`, streams and `synchronize()` do nothing, the random
  state is the CPU generator's), and tensor factories given `device="cuda"` or `pin_memory` make plain host tensors.
- host tensors: while one function runs, `Tensor.cuda()` returns the tensor itself and `Tensor.type()` gives a host
  tensor the name of its CUDA sibling; both are put back when the function returns.
- replace: one function is replaced by its CPU equivalent, or wrapped.

`DO` stands for `optimizer.distrib_optimizer.DistributedOptimizer`.

| site (`megatron.core.`) | remedy | why |
|---|---|---|
| `tensor_parallel.mappings` | proxy | gather, reduce-scatter and all-to-all buffers on `current_device()` |
| `tensor_parallel.layers` | proxy | weights, and sequence-parallel buffers, on `current_device()` |
| `tensor_parallel.utils` | proxy | buffers of the 1-D split and gather used by distributed recompute |
| `tensor_parallel.random` | proxy | tracker seeds and reads the CUDA generator |
| `tensor_parallel.random._set_cuda_rng_state` | replace | setting waits for a CUDA start that never comes |
| `tensor_parallel.random.CudaRNGStatesTracker.fork` | replace | warns when the CPU generator moves, as here it must |
| `pipeline_parallel.p2p_communication` | proxy | receive buffers on `current_device()`, `synchronize()` |
| `pipeline_parallel.schedules` | proxy | token counter with `device="cuda"` |
| `distributed.param_and_grad_buffer` | proxy | parameter and gradient buffers on `current_device()` |
| `optimizer.optimizer` | proxy | overflow flag and loss scale with `device="cuda"` |
| `optimizer.clip_grads` | proxy | norm buffers with `device="cuda"` |
| `optimizer.clip_grads.clip_grad_by_total_norm_fp32` | host tensors | asserts `torch.cuda.FloatTensor` |
| `optimizer.distrib_optimizer` | proxy | main-parameter buffers on `current_device()` |
| `DO._build_model_and_main_param_groups` | host tensors | refuses all but CUDA tensor types |
| `DO.get_parameter_state_dp_zero` | host tensors | `.cuda()` on the state gathered for a checkpoint |
| `optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__` | host tensors | refuses all but CUDA tensor types |
| `DO.sharded_state_dict` | replace | PyTorch's Adam has no state yet when a checkpoint is to be loaded |
| `DO.load_state_dict` | replace | one `step` tensor for all parameters, which Adam counts up for each |
| `DO._set_main_param_and_optimizer_states` | replace | looks among loaded tensors for that `step`, kept elsewhere |
| `models.common.embeddings.rotary_pos_embedding` | proxy | moves frequencies to `current_device()` |
| `models.common.embeddings.rope_utils` | proxy | pins the context-parallel index |
| `models.common.embeddings.rope_utils.get_pos_emb_on_this_cp_rank` | host tensors | `.cuda()` on that index |
| `transformer.attention` | proxy | key-value cache on `current_device()` |
| `dist_checkpointing.mapping.ShardedTensor.init_data` | replace | called with "cuda" for shards still to be loaded |
| `dist_checkpointing.exchange_utils` | proxy | exchange buffers with `device="cuda"` |
| `dist_checkpointing.exchange_utils.exchange_by_distribution` | host tensors | `.cuda()` on loaded shards |
| `dist_checkpointing.strategies.fully_parallel` | proxy | `synchronize()` |
| `dist_checkpointing.strategies.filesystem_async` | proxy | `synchronize()` |
| `dist_checkpointing.strategies.async_utils` | proxy | completion flag on `current_device()` |
| `dist_checkpointing.strategies.state_dict_saver` | proxy | failure flag on `current_device()` |
| `rerun_state_machine` | proxy | names the device in the message about a NaN loss or gradient |
| `timers` | proxy | `synchronize()` around a timed span |
| `utils` | proxy | buffers of the global memory pool on `current_device()` |

| site (`nemo.lightning.`), only with `enable(lightning=True)` | remedy | why |
|---|---|---|
| `megatron_parallel` | proxy | side stream around the DDP wrap, zero loss of other pipeline stages |
| `pytorch.callbacks.model_checkpoint` | proxy | zero loss of other pipeline stages when a checkpoint is named |
| `io.pl._fix_tensors_device` | replace | asserts that CUDA has started, to move tensors from one GPU to another |
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_cosmos.errors import UserError, user_error

SUPPORTED_MEGATRON = "0.15."
"""Version prefix of the Megatron-core that the sites were checked against."""

_MEGATRON_PROXIES = (
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.utils",
    "tensor_parallel.random",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "models.common.embeddings.rotary_pos_embedding",
    "models.common.embeddings.rope_utils",
    "transformer.attention",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "rerun_state_machine",
    "timers",
    "utils",
)

_LIGHTNING_PROXIES = ("megatron_parallel", "pytorch.callbacks.model_checkpoint")
_LIGHTNING_DEVICE_FIX = ("nemo.lightning.io.pl", "_fix_tensors_device")

_HOST_TENSOR_FUNCTIONS = (
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
    ("optimizer.optimizer", "clip_grad_by_total_norm_fp32"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.get_parameter_state_dp_zero"),
    ("models.common.embeddings.rope_utils", "get_pos_emb_on_this_cp_rank"),
    ("models.common.embeddings.rotary_pos_embedding", "get_pos_emb_on_this_cp_rank"),
    ("dist_checkpointing.exchange_utils", "exchange_by_distribution"),
    ("dist_checkpointing.strategies.fully_parallel", "exchange_by_distribution"),
)
"""Module and qualified name; a function imported by name elsewhere is listed once for each module that calls it."""

_FACTORIES = frozenset(
    {"arange", "empty", "empty_like", "full", "ones", "ones_like", "rand", "randn", "tensor", "zeros", "zeros_like"}
)


class _NoStream:
    """A CUDA stream that has nothing to do: host operations are ordered already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def synchronize(self) -> None: ...


class _HostCuda:
    """Stands in for `torch.cuda`; what is not named here is the real thing."""

    Stream = _NoStream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of torch.cuda
        return getattr(torch.cuda, name)

    @property
    def random(self) -> _HostCuda:
        return self

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, *_: object) -> None: ...

    def empty_cache(self) -> None: ...

    def stream(self, _: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self, *_: object) -> _NoStream:
        return _NoStream()

    def default_stream(self, *_: object) -> _NoStream:
        return _NoStream()

    def get_rng_state(self, *_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: object, **__: object) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


class _HostTorch:
    """Stands in for the name `torch` inside one module."""

    cuda = _HostCuda()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of torch
        value = getattr(torch, name)
        return _on_host(value) if name in _FACTORIES else value


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - the factory's own arguments
        kwargs.pop("pin_memory", None)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _host_tensors() -> Iterator[None]:
    """While open, `Tensor.cuda()` stays on the host and `Tensor.type()` gives the name of the CUDA type."""
    cuda, tensor_type = torch.Tensor.cuda, torch.Tensor.type

    def named_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as Tensor.type
        given = tensor_type(tensor, *args, **kwargs)
        return given.replace("torch.", "torch.cuda.", 1) if isinstance(given, str) else given

    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.Tensor.type = named_as_cuda
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.Tensor.type = cuda, tensor_type


def _run_with_host_tensors(function: Callable) -> Callable:
    inner = function.__func__ if isinstance(function, classmethod) else function

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own arguments
        with _host_tensors():
            return inner(*args, **kwargs)

    return classmethod(wrapped) if isinstance(function, classmethod) else wrapped


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


@contextlib.contextmanager
def _fork_rng_state(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:  # noqa: ANN401 - patched method
    if name not in tracker.states_:
        raise KeyError(f"random state {name!r} is not added; call model_parallel_cuda_manual_seed first")
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _with_adam_state(sharded_state_dict: Callable) -> Callable:
    @functools.wraps(sharded_state_dict)
    def wrapped(optimizer: Any, model: dict, is_loading: bool = False, **kwargs: Any) -> dict:  # noqa: ANN401 - Megatron's
        adam = optimizer.optimizer
        if is_loading and not adam.state:
            for param in (param for group in adam.param_groups for param in group["params"]):
                moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[param] = {"step": torch.tensor(0.0), **moments}
        return sharded_state_dict(optimizer, model, is_loading, **kwargs)

    return wrapped


def _with_own_steps(load_state_dict: Callable) -> Callable:
    @functools.wraps(load_state_dict)
    def wrapped(optimizer: Any, state_dict: dict) -> None:  # noqa: ANN401 - Megatron's
        load_state_dict(optimizer, state_dict)
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()

    return wrapped


def _keeping_step(set_states: Callable) -> Callable:
    @functools.wraps(set_states)
    def wrapped(optimizer: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:  # noqa: ANN401
        group, place = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][place]]
        set_states(optimizer, model_param, {"step": state["step"], **tensors})

    return wrapped


def _init_on_host(init_data: Callable) -> Callable:
    @functools.wraps(init_data)
    def wrapped(shard: Any, device: str | torch.device, **kwargs: Any) -> None:  # noqa: ANN401 - Megatron's
        init_data(shard, "cpu" if torch.device(device).type == "cuda" else device, **kwargs)

    return wrapped


_REPLACED_FUNCTIONS = (
    ("tensor_parallel.random", "_set_cuda_rng_state", lambda _: _set_rng_state),
    ("tensor_parallel.random", "CudaRNGStatesTracker.fork", lambda _: _fork_rng_state),
    ("dist_checkpointing.mapping", "ShardedTensor.init_data", _init_on_host),
)
"""Module, qualified name, and what makes the new function of the old one."""

_ADAM_FUNCTIONS = (
    ("optimizer.distrib_optimizer", "DistributedOptimizer.sharded_state_dict", _with_adam_state),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.load_state_dict", _with_own_steps),
    ("optimizer.distrib_optimizer", "DistributedOptimizer._set_main_param_and_optimizer_states", _keeping_step),
)
"""The same, for PyTorch's Adam."""


class _Patches:
    """What is patched at the moment, and how to undo it. Megatron's modules are process-wide, and so is this."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self.applied: set[str] = set()

    def set(self, module: str, qualified_name: str, make: Callable[[Any], Any]) -> None:
        """Replaces an attribute of a module, or of a class in it, by `make(old)`."""
        *path, name = qualified_name.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(module))
        old = vars(owner)[name]
        setattr(owner, name, make(old))
        self._undo.callback(setattr, owner, name, old)
        self.applied.add(f"{module}:{qualified_name}")

    def undo(self) -> None:
        self._undo.close()
        self.applied.clear()


_patches = _Patches()


def enable(*, lightning: bool = False) -> None:
    """Makes Megatron-core run on the CPU of this process; calling it again changes nothing.

    Args:
        lightning: Also cure the places in `nemo.lightning` (imports it, which takes some seconds).

    Raises:
        UserError: CUDA is available, or Megatron-core is of a version that the sites were not checked against.
    """
    if torch.cuda.is_available():
        raise UserError(
            "Megatron on CPU was asked for where CUDA is available. Use accelerator 'gpu' (or hide the GPUs)."
        )
    check_megatron_version()
    if not is_enabled():
        for name in _MEGATRON_PROXIES:
            _patches.set(f"megatron.core.{name}", "torch", lambda _: _HostTorch())
        for module, name in _HOST_TENSOR_FUNCTIONS:
            _patches.set(f"megatron.core.{module}", name, _run_with_host_tensors)
        for module, name, make in _REPLACED_FUNCTIONS:
            _patches.set(f"megatron.core.{module}", name, make)
    enable_torch_adam()
    if lightning and not is_enabled(lightning=True):
        for name in _LIGHTNING_PROXIES:
            _patches.set(f"nemo.lightning.{name}", "torch", lambda _: _HostTorch())
        _patches.set(*_LIGHTNING_DEVICE_FIX, lambda _: lambda checkpoint: checkpoint)


def enable_torch_adam() -> None:
    """Lets Megatron's distributed optimizer save and load the states of PyTorch's Adam; a part of `enable`.

    Megatron takes that Adam where neither TransformerEngine nor Apex is installed, on a GPU too, where all else is left
    as it is. Calling it again changes nothing.

    Raises:
        UserError: As `enable`, of Megatron's version.
    """
    check_megatron_version()
    for module, name, make in _ADAM_FUNCTIONS:
        if f"megatron.core.{module}:{name}" not in _patches.applied:
            _patches.set(f"megatron.core.{module}", name, make)


def disable() -> None:
    """Puts every patched place back; where nothing is patched it does nothing."""
    _patches.undo()


def is_enabled(*, lightning: bool = False) -> bool:
    """Tells whether `enable` (with the same argument) is in force."""
    module = f"nemo.lightning.{_LIGHTNING_PROXIES[0]}" if lightning else f"megatron.core.{_MEGATRON_PROXIES[0]}"
    return f"{module}:torch" in _patches.applied


def check_megatron_version() -> None:
    """Refuses a Megatron-core that these sites were not checked against.

    Raises:
        UserError: The installed version is another one.
    """
    from megatron.core import __version__

    if not __version__.startswith(SUPPORTED_MEGATRON):
        raise user_error(
            "megatron-core", __version__, f"version {SUPPORTED_MEGATRON}x", "Run: pip install 'megatron-core==0.15.3'."
        )
