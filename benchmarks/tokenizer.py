"""Speed and memory of the video tokenizer beside diffusers' `AutoencoderKLCosmos` with the same weights.

    python -m benchmarks.tokenizer                     # CV8x8x8-720p, 17 frames of 256x256
    python -m benchmarks.tokenizer --streaming         # and a decode of 121 frames, chunk by chunk

Both run in one process in turn. `ratio` is diffusers' time over ours; `memory` our peak over theirs, the model's own
weights and the input left out; `FLOP` our floating-point operations over theirs; `of GEMM` is our share of the FLOP/s
that the best square matrix product reaches on the same threads. Results that are not the same end it (`MOST_APART`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import alternate, gemm_peak, machine
from nemo_cosmos.tokenizer import conversion, state_dict, streaming
from nemo_cosmos.tokenizer.config import TokenizerConfig, preset
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_APART = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Largest difference between results that counts as the same output, over the largest value or 1."""


def main() -> None:
    """Runs what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="CV8x8x8-720p", help="architecture (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=17, help="1 + 8k (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each (default: %(default)s)")
    parser.add_argument("--streaming", action="store_true", help="also decode 121 frames chunk by chunk")
    args = parser.parse_args()
    print(f"{args.preset}, {args.frames} frames of {args.size}x{args.size}; {machine()}")
    titles = (
        f"{'ours s':>8}{'diffusers s':>13}{'ratio':>7}{'frames/s':>10}{'MiB':>7}{'memory':>8}{'FLOP':>7}{'of GEMM':>9}"
    )
    print(" " * 24 + titles)
    for dtype in args.dtypes:
        for threads in args.threads:
            torch.set_num_threads(threads)
            compare(preset(args.preset), DTYPES[dtype], args, f"{dtype}, {threads} threads")
    if args.streaming:
        stream(preset(args.preset), args.size)


@torch.inference_mode()
def compare(config: TokenizerConfig, dtype: torch.dtype, args: argparse.Namespace, label: str) -> None:
    """Prints a row for encoding and one for decoding."""
    ours = CausalVideoTokenizer(config).to(dtype).eval()
    theirs = twin(ours).to(dtype).eval()
    video = torch.rand(1, 3, args.frames, args.size, args.size, dtype=dtype) * 2 - 1
    latent = ours.encode(video)
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "encode": (lambda: ours.encode(video), lambda: theirs.encode(video).latent_dist.mode()),
        "decode": (lambda: ours.decode(latent), lambda: theirs.decode(latent).sample),
    }
    peak = gemm_peak(dtype)
    for name, (run_ours, run_theirs) in pairs.items():
        calls, (given, own_operations) = {"ours": run_ours}, counted(run_ours)
        try:
            expected, other_operations = counted(run_theirs)
        except NotImplementedError as problem:  # torch lacks some operations for bf16 on CPUs
            remark = f"diffusers cannot: {problem}"
        else:
            apart = ((given - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
            if not apart <= MOST_APART[dtype]:
                raise SystemExit(f"{name}, {label}: results are {apart:.1e} apart")
            remark = f"largest difference {apart:.1e}"
            calls["diffusers"] = run_theirs
        result = alternate(calls, args.rounds)
        own, other = result["ours"], result.get("diffusers")
        seconds, ratio, memory, share = "-", "-", "-", "-"
        if other is not None:
            seconds, ratio = f"{other.seconds:.2f}", f"{other.seconds / own.seconds:.2f}"
            memory = f"{own.peak_mib / other.peak_mib:.2f}"
            share = f"{own_operations / other_operations:.2f}"
        print(
            f"{name + ', ' + label:24}{own.seconds:8.2f}{seconds:>13}{ratio:>7}{args.frames / own.seconds:10.2f}"
            f"{own.peak_mib:7.0f}{memory:>8}{share:>7}{own_operations / own.seconds / peak:9.0%}   {remark}",
            flush=True,
        )


def counted(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Returns a call's result and the floating-point operations of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, counter.get_total_flops()


def twin(tokenizer: CausalVideoTokenizer) -> torch.nn.Module:
    """Builds diffusers' model with the weights of ours."""
    from diffusers import AutoencoderKLCosmos

    config = tokenizer.tokenizer_config
    values = {key: value for key, value in conversion.diffusers_config(config).items() if key != "_class_name"}
    model = AutoencoderKLCosmos(**values)
    model.load_state_dict(state_dict.to_diffusers_names(tokenizer.state_dict(), config))
    return model


@torch.inference_mode()
def stream(config: TokenizerConfig, size: int) -> None:
    """Prints time and memory of decoding 121 frames, one latent frame at a time."""
    tokenizer = CausalVideoTokenizer(config).eval()
    channels, frames, height, width = config.latent_shape(121, size, size)
    latent = torch.randn(1, channels, frames, height, width)

    def decode() -> None:
        for _ in streaming.decode_stream(tokenizer, latent.split(1, dim=2)):
            pass

    result = alternate({"stream": decode}, 1)["stream"]
    print(f"decode 121 frames of {size}x{size} in chunks, fp32: {result.seconds:.1f} s, {result.peak_mib:.0f} MiB")


if __name__ == "__main__":
    main()
