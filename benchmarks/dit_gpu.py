"""The published 7B diffusion transformer on one GPU: a layer beside diffusers', and a sampler's step.

    python -m benchmarks.dit_gpu                       # 10,240 and 56,320 tokens
    python -m benchmarks.dit_gpu --tokens 10240 --rounds 3

A layer is what three layers take more than one, halved, forward and backward in bf16, gradients added to those before;
weights are random, and diffusers has the same, with its own choice of attention. `MFU` is the share of the FLOP/s that
the best large bf16 matrix product reached in the same process, with operations counted by formula. A sampler's step is
the whole network, on the prompt and on the negative one in one batch, and the integrator.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemo_cosmos.diffusion.config import PRESETS, DiTConfig
from nemo_cosmos.diffusion.flops import forward_flops, training_flops
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.diffusion.samplers import sample_euler
from nemo_cosmos.diffusion.state_dict import to_diffusers
from nemo_cosmos.generation.denoiser import VideoDenoiser
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.device import matmul_flops_per_s

LATENTS = {10_240: (8, 64, 80), 56_320: (16, 88, 160)}
"""T, H, W by tokens: 57 frames of 512 x 640 pixels and 121 of 704 x 1280, as the first two stages of training."""
TEXT_TOKENS = 512
FEW, MORE = 1, 3
"""Layers of the two networks whose times are subtracted."""
LEVELS = (10.0, 5.0, 2.0, 1.0)
"""Of noise, between which a run of the sampler has three steps."""


def main() -> None:
    """Runs what the command line asks for and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", choices=LATENTS, default=list(LATENTS))
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    with startup.initialize():
        peak = matmul_flops_per_s(torch.bfloat16)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bf16 product {peak / 1e12:.0f} TFLOP/s")
        print(f"{'':30}{'ours ms':>9}{'diffusers ms':>14}{'ratio':>7}{'MFU':>6}{'peak GiB':>10}")
        for tokens in args.tokens:
            compare_layer(tokens, args.rounds, peak)
        network = randomized(config_of(num_layers=None)).eval()
        for tokens in args.tokens:
            time_sampler(network, tokens, args.rounds, peak)


def config_of(num_layers: int | None) -> DiTConfig:
    """The 7B network in bf16, whole or with a few of its layers, without the padding mask (see `benchmarks.dit`)."""
    config = PRESETS["diffusion_7b"](concat_padding_mask=False, params_dtype=torch.bfloat16)
    return config if num_layers is None else dataclasses.replace(config, num_layers=num_layers)


def randomized(config: DiTConfig) -> CosmosDiT:
    """The network with small random matrices, since many start at zero."""
    model = CosmosDiT(dataclasses.replace(config, perform_initialization=False)).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0)
    return model


def inputs_of(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, noise level and text."""
    latent = torch.randn(batch, 16, *LATENTS[tokens], device="cuda", dtype=torch.bfloat16)
    text = torch.randn(batch, TEXT_TOKENS, 1024, device="cuda", dtype=torch.bfloat16)
    return latent, torch.zeros(batch, device="cuda", dtype=torch.bfloat16), text


def compare_layer(tokens: int, rounds: int, peak: float) -> None:
    """Prints the row of a layer's forward and backward pass."""
    latent, times, text = inputs_of(tokens)
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    operations, peaks = [], []
    for num_layers in (FEW, MORE):
        ours = randomized(config_of(num_layers)).train()
        theirs = twin_of(ours)
        calls = {
            "ours": lambda ours=ours: ours(latent, times, text, fps=24.0),
            "diffusers": lambda theirs=theirs: theirs(latent, times, text, fps=24, return_dict=False)[0],
        }
        if num_layers == FEW:
            with torch.no_grad():
                mine, other = (call().float() for call in calls.values())
            difference = ((mine - other).norm() / other.norm()).item()
        measured = alternate(
            {name: lambda call=call: call().float().square().mean().backward() for name, call in calls.items()}, rounds
        )
        for name, (taken, used) in measured.items():
            seconds[name].append(taken)
            if name == "ours":
                peaks.append(used)
        operations.append(training_flops(ours.config, LATENTS[tokens], text_length=TEXT_TOKENS))
        del ours, theirs, calls
        release()
    layer = {name: (more - few) / (MORE - FEW) for name, (few, more) in seconds.items()}
    per_layer = (operations[1] - operations[0]) / (MORE - FEW)
    print(
        f"{f'layer, {tokens:,} tokens':30}{layer['ours'] * 1e3:9.1f}{layer['diffusers'] * 1e3:14.1f}"
        f"{layer['diffusers'] / layer['ours']:7.2f}{per_layer / layer['ours'] / peak:6.0%}"
        f"{(peaks[1] - peaks[0]) / (MORE - FEW):10.1f}   relative difference of outputs {difference:.1e}",
        flush=True,
    )


def alternate(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds, and GiB that a call adds at most, of functions called in turn, each first once uncounted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    used = {}
    for counted in [False] + [True] * rounds:
        for name, call in calls.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            call()
            torch.cuda.synchronize()
            if counted:
                taken[name].append(time.perf_counter() - began)
                used[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {name: (statistics.median(taken[name]), used[name]) for name in calls}


def twin_of(ours: CosmosDiT) -> nn.Module:
    """Diffusers' network with the same weights."""
    from diffusers import CosmosTransformer3DModel

    state, config = to_diffusers(ours.state_dict(), ours.config)
    with torch.device("cuda"):
        theirs = CosmosTransformer3DModel(**config).to(torch.bfloat16)
    theirs.load_state_dict(state)
    return theirs.train()


@torch.inference_mode()
def time_sampler(network: CosmosDiT, tokens: int, rounds: int, peak: float) -> None:
    """Prints the row of a sampler's step."""
    latent, _, text = inputs_of(tokens)
    mask = torch.zeros_like(latent[:, :1])
    denoise = VideoDenoiser(
        network=lambda noisy, times, *rest, **named: network(noisy.bfloat16(), times.bfloat16(), *rest, **named),
        edm=EDM(),
        text_emb=text,
        negative_text_emb=torch.zeros_like(text),
        fps=torch.full((1,), 24.0),
        given=torch.zeros_like(latent),
        mask=mask,
        augment_noise=torch.zeros_like(latent),
        guidance=7.0,
    )
    noise, sigmas = latent.float(), torch.tensor(LEVELS)

    def run() -> None:
        sample_euler(denoise, noise, sigmas)

    taken, used = alternate({"ours": run}, rounds)["ours"]
    step = taken / (len(LEVELS) - 1)
    operations = forward_flops(network.config, LATENTS[tokens], text_length=TEXT_TOKENS, num_samples=2)
    print(
        f"{f'sampler step, {tokens:,} tokens':30}{step * 1e3:9.1f}{'':21}{operations / step / peak:6.0%}{used:10.1f}",
        flush=True,
    )


def release() -> None:
    """Gives the memory of what is no longer used back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
