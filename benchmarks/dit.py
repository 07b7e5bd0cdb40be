"""Speed and memory of the diffusion transformer beside diffusers' `CosmosTransformer3DModel` with the same weights.

    python -m benchmarks.dit                      # 45 M parameters, 4,096 tokens, fp32 and bf16, 1 and 2 threads
    python -m benchmarks.dit --tokens 1024 --dtypes fp32 --threads 1

Both run in one process in turn. `ratio` is diffusers' time over ours; `memory` our peak over theirs, weights and inputs
left out; `of GEMM` is our share of the FLOP/s that the best square matrix product reaches on the same threads. As
published, heads have 128 channels and the text 512 tokens of 1,024. The padding mask is left out, for diffusers resizes
it by a further library.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate, gemm_peak, machine
from nemo_cosmos.diffusion.config import DiTConfig
from nemo_cosmos.diffusion.flops import training_flops
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.state_dict import to_diffusers
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.host_memory import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"num_layers": 7, "hidden_size": 512, "num_attention_heads": 4, "concat_padding_mask": False}
FRAMES, TEXT_TOKENS = 4, 512


def main() -> None:
    """Runs what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="4 times a square (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each (default: %(default)s)")
    args = parser.parse_args()
    keep_freed_memory()  # as our training does; both have it
    with startup.initialize():
        print(f"{args.tokens} tokens; {machine()}")
        print(
            f"{'':32}{'ours s':>8}{'diffusers s':>13}{'ratio':>7}{'tokens/s':>10}{'MiB':>7}{'memory':>8}{'of GEMM':>9}"
        )
        for dtype in args.dtypes:
            for threads in args.threads:
                torch.set_num_threads(threads)
                compare(DTYPES[dtype], args.tokens, args.rounds, f"{dtype}, {threads} threads")


def compare(dtype: torch.dtype, num_tokens: int, rounds: int, label: str) -> None:
    """Prints a row for the forward pass and one for forward and backward."""
    ours, theirs = twins(dtype)
    side = 2 * round((num_tokens / FRAMES) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, FRAMES, side, side, generator=generator).to(dtype)
    times = torch.zeros(1)
    text = torch.randn(1, TEXT_TOKENS, 1024, generator=generator).to(dtype)

    def run_ours() -> Tensor:
        return ours(latent, times, text, fps=24.0)

    def run_theirs() -> Tensor:
        return theirs(latent, times.to(dtype), text, fps=24, return_dict=False)[0]

    peak = gemm_peak(dtype)
    with torch.inference_mode():
        difference = (run_ours() - run_theirs()).abs().max().item()
    # By formula, as training counts them: torch's own counter knows the attention of GPUs alone.
    flops = training_flops(ours.config, (FRAMES, side, side), text_length=TEXT_TOKENS, num_samples=1)
    passes: dict[str, tuple[Callable[[Callable[[], Tensor], nn.Module], object], float]] = {
        "forward": (forward, flops / 3),
        "forward and backward": (forward_and_backward, flops),
    }
    for name, (run, operations) in passes.items():
        result = alternate(
            {"ours": lambda run=run: run(run_ours, ours), "diffusers": lambda run=run: run(run_theirs, theirs)}, rounds
        )
        own, other = result["ours"], result["diffusers"]
        print(
            f"{name + ', ' + label:32}{own.seconds:8.2f}{other.seconds:13.2f}{other.seconds / own.seconds:7.2f}"
            f"{num_tokens / own.seconds:10.0f}{own.peak_mib:7.0f}{own.peak_mib / other.peak_mib:8.2f}"
            f"{operations / own.seconds / peak:9.0%}   largest difference {difference:.1e}",
            flush=True,
        )


@torch.inference_mode()
def forward(run: Callable[[], Tensor], model: nn.Module) -> Tensor:
    """The network's prediction alone."""
    return run()


def forward_and_backward(run: Callable[[], Tensor], model: nn.Module) -> None:
    """What a training step does before the optimizer."""
    model.zero_grad(set_to_none=True)
    run().float().square().mean().backward()


def twins(dtype: torch.dtype) -> tuple[CosmosDiT, nn.Module]:
    """Builds both models with one set of random weights."""
    from diffusers import CosmosTransformer3DModel

    ours = CosmosDiT(DiTConfig(**SIZES, params_dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 2:  # many start at zero
                scale = 0.5 * parameter.shape[1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    state, config = to_diffusers(ours.state_dict(), ours.config)
    theirs = CosmosTransformer3DModel(**config).to(dtype)
    theirs.load_state_dict(state)
    return ours.train(), theirs.train()


if __name__ == "__main__":
    main()
