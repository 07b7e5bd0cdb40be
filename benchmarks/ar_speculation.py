"""What speculation gains on held-out clips with an autoregressive WFM's own weights.

    python -m benchmarks.ar_speculation runs/autoregressive_tiny_medusa runs/tokens
    python -m benchmarks.ar_speculation WEIGHTS CACHE --clips 32 --dtype bf16 --threads 2 --guesses 15

Each clip is written after its first latent frame by every drafter in turn, in one process: greedily, and by the
published sampling. `tokens/pass` counts all written tokens and all passes of the transformer; `as plain` tells whether
every token was that of plain decoding, which may differ by rounding alone where two tokens are equally likely.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.ar import DTYPES
from benchmarks.measure import machine
from nemo_cosmos.autoregressive.architecture import config_from
from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.decode import UNKNOWN, Drafter, write_tokens
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.speculation import JacobiDrafter, MedusaDrafter, PreviousFrameDrafter
from nemo_cosmos.autoregressive.token_sampling import GREEDY, TokenSampling
from nemo_cosmos.autoregressive.warm_start import load_whole_weights
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import LatentDataset
from nemo_cosmos.data.token_files import TokenFiles, are_token_files
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel import startup
from nemo_cosmos.post_training.start import find_base
from nemo_cosmos.training.load import load_weights
from nemo_cosmos.transformer.actions import scaled_actions

SAMPLINGS = {"greedy": GREEDY, "sampled": TokenSampling()}


def main() -> None:
    """Runs what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="checkpoint, run's folder or .safetensors of an autoregressive WFM")
    parser.add_argument("cache", help="folder that `nemo-cosmos tokenize` wrote with the WFM's tokenizer")
    parser.add_argument("--clips", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--guesses", type=int, nargs="+", default=[7, 15], help="of drafters other than Medusa's alone")
    parser.add_argument("--rounds", type=int, default=1, help="each clip's fastest counts (default: %(default)s)")
    args = parser.parse_args()
    print(machine())
    torch.set_num_threads(args.threads)
    with startup.initialize():
        model = load(args.weights, DTYPES[args.dtype])
        clips = list(held_out(args.cache, model.config, args.clips))
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{size:,} parameters, {args.dtype}, {args.threads} threads, {len(clips)} clips of {clips[0].grid}")
        for name, sampling in SAMPLINGS.items():
            print(f"{name:31}tokens/s  ratio  tokens/pass  as plain")
            compare(model, clips, sampling, args)


def load(place: str, dtype: torch.dtype) -> CosmosAR:
    """A whole WFM."""
    base = find_base(place)
    card = CheckpointCard.from_dict(read_json(base.card))
    model = CosmosAR(config_from(card.config, params_dtype=dtype, backend="torch")).eval()
    (load_weights if base.is_checkpoint else load_whole_weights)(model, base.weights)
    return model


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a clip is written from."""

    tokens_BS: Tensor
    grid: tuple[int, int, int]
    text_BLC: Tensor | None
    actions_BFA: Tensor | None


def held_out(cache: str, config: ARConfig, num_clips: int) -> Iterator[Clip]:
    """Clips spread over the held-out split, one of each batch, of which the first latent frame is known."""
    if are_token_files(cache):
        samples: LatentDataset | TokenFiles = TokenFiles(cache, split="heldout")
    else:
        samples = LatentDataset(cache, split="heldout", with_actions=config.action_dim is not None)
    for index in torch.linspace(0, len(samples) - 1, min(num_clips, len(samples))).long().tolist():
        sample = samples[index]
        frames, height, width = sample["tokens"].shape
        tokens = sample["tokens"].long().flatten()
        tokens[height * width :] = UNKNOWN
        begin = tokens.new_full((config.num_first,), config.begin_of_video)
        yield Clip(
            tokens_BS=torch.cat([begin, tokens])[None],
            grid=(frames, height, width),
            text_BLC=None if config.crossattn_emb_channels is None else sample["text_emb"][None],
            actions_BFA=None if config.action_dim is None else scaled_actions(sample["actions"][None]),
        )


def drafters_of(model: CosmosAR, grid: tuple[int, int, int], num_guesses: Sequence[int]) -> dict[str, Drafter | None]:
    """All there are, plain decoding first."""
    drafters: dict[str, Drafter | None] = {"plain": None}
    if model.config.num_medusa_heads:
        drafters["Medusa"] = MedusaDrafter(model)
        drafters["Jacobi, Medusa"] = JacobiDrafter(MedusaDrafter(model))
    for number in num_guesses:
        drafters[f"frame before, {number}"] = PreviousFrameDrafter(grid, num_guesses=number)
        drafters[f"Jacobi, frame before, {number}"] = JacobiDrafter(PreviousFrameDrafter(grid, num_guesses=number))
    return drafters


@dataclass
class Total:
    """Of all clips by one drafter."""

    seconds: float = 0.0
    written: int = 0
    passes: int = 0
    tokens: list[Tensor] = field(default_factory=list)


def compare(model: CosmosAR, clips: list[Clip], sampling: TokenSampling, args: argparse.Namespace) -> None:
    """Prints a row for each drafter."""
    drafters = drafters_of(model, clips[0].grid, args.guesses)
    totals = {name: Total() for name in drafters}
    for seed, clip in enumerate(clips):
        seconds: dict[str, list[float]] = {name: [] for name in drafters}
        for round_number in range(args.rounds):
            for name, drafter in drafters.items():
                start = time.perf_counter()
                written = write_tokens(
                    model,
                    clip.tokens_BS,
                    clip.grid,
                    clip.text_BLC,
                    sampling=sampling,
                    seeds=[seed],
                    actions_BFA=clip.actions_BFA,
                    drafter=drafter,
                )
                seconds[name].append(time.perf_counter() - start)
                if round_number == 0:
                    totals[name].written += written.num_written
                    totals[name].passes += written.num_passes
                    totals[name].tokens.append(written.tokens_BS)
        for name, times in seconds.items():
            totals[name].seconds += min(times)
    plain = totals["plain"]
    for name, total in totals.items():
        same = torch.equal(torch.cat(total.tokens), torch.cat(plain.tokens))
        print(
            f"{name:31}{total.written / total.seconds:8.1f}{plain.seconds / total.seconds:7.2f}"
            f"{total.written / total.passes:13.2f}  {same}",
            flush=True,
        )


if __name__ == "__main__":
    main()
