"""Speed of autoregressive decoding beside the memory's own and transformers' `LlamaForCausalLM` of equal size.

    python -m benchmarks.ar                # 49M parameters, 256 tokens given, 768 written
    python -m benchmarks.ar --dtypes bf16 --threads 1 --written 96

The roof is the bare matrix-vector products of a token: those of all the weights that it needs, in their dtype, by
whichever of torch's operations is fastest here; nothing that reads each weight once per token can be faster. All run in
one process in turn. tokens/s is that of the median token; `of roof` is ours over the roof, `ratio` ours over
transformers'.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import machine
from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.decode import UNKNOWN, write_tokens
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.autoregressive.token_sampling import GREEDY, TokenSampler
from nemo_cosmos.parallel import startup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {
    "num_layers": 12,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 1792,
    "vocab_size": 16_000,
    "share_embeddings_and_output_weights": True,
}
"""As the published models: four queries to a key, an MLP 3.5 times as wide as the model. All weights are read for each
token, the embedding as the output layer."""
ROWS, COLUMNS = 8, 32
GIVEN = ROWS * COLUMNS
"""One latent frame."""


def main() -> None:
    """Runs what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--written", type=int, default=768, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each (default: %(default)s)")
    args = parser.parse_args()
    print(machine())
    with startup.initialize():
        for dtype in args.dtypes:
            model = CosmosAR(ARConfig(**SIZES, params_dtype=DTYPES[dtype], backend="torch")).eval()
            other = llama(model)
            size = sum(parameter.numel() for parameter in model.parameters())
            print(f"{size:,} parameters, {GIVEN} tokens given, {args.written} written")
            print(f"{'':18}{'roof':>8}{'ours':>8}{'transformers':>14}  tokens/s")
            for threads in args.threads:
                torch.set_num_threads(threads)
                compare(model, other, args, f"{dtype}, {threads} threads")


@torch.inference_mode()
def compare(model: CosmosAR, other: torch.nn.Module, args: argparse.Namespace, label: str) -> None:
    """Prints a row."""
    given = torch.arange(GIVEN)[None] % SIZES["vocab_size"]
    frames = -(-(GIVEN + args.written) // GIVEN)
    tokens = torch.zeros(1, frames * GIVEN, dtype=torch.long)
    tokens[:, :GIVEN] = given
    tokens[:, GIVEN : GIVEN + args.written] = UNKNOWN
    products = bare_products(model)
    clocks = {name: Clock() for name in (*products, "ours", "transformers")}

    def ours() -> None:
        grid = (frames, ROWS, COLUMNS)
        with clocks["ours"].at_each_call(TokenSampler, "draw"):
            write_tokens(model, tokens, grid, sampling=GREEDY, seeds=[0])

    def theirs() -> None:
        other.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=args.written,
            min_new_tokens=args.written,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            stopping_criteria=[clocks["transformers"]],
        )

    for _ in range(args.rounds):
        for name, run in products.items():
            clocks[name].start()
            for _ in range(args.written // 8):
                run()
                clocks[name].tick()
        for name, run in (("ours", ours), ("transformers", theirs)):
            clocks[name].start()
            run()
    rates = {name: 1 / clock.median() for name, clock in clocks.items()}
    best = max(products, key=lambda name: rates[name])
    print(
        f"{label:18}{rates[best]:8.1f}{rates['ours']:8.1f}{rates['transformers']:14.1f}   of roof "
        f"{rates['ours'] / rates[best]:.0%}, ratio {rates['ours'] / rates['transformers']:.2f}   (roof by {best})",
        flush=True,
    )


class Clock:
    """Times the tokens of several runs."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._last = 0.0

    def start(self) -> None:
        """Begins a run, whose first interval is not a token's alone."""
        self._last = 0.0

    def tick(self) -> None:
        """Ends a token."""
        now = time.perf_counter()
        if self._last:
            self._seconds.append(now - self._last)
        self._last = now

    def median(self) -> float:
        """Seconds for a token; what else the machine did in some of them does not count."""
        return statistics.median(self._seconds)

    @contextlib.contextmanager
    def at_each_call(self, owner: type, name: str) -> Iterator[None]:
        """While open, ticks whenever a method is called."""
        method = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            self.tick()
            return method(*args, **kwargs)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, method)

    def __call__(self, tokens: Tensor, *_: object, **__: object) -> Tensor:
        """Ticks as a stopping criterion of transformers', which never stops."""
        self.tick()
        return torch.zeros(len(tokens), dtype=torch.bool)


def bare_products(model: CosmosAR) -> dict[str, Callable[[], object]]:
    """The products of a token with all matrices, by each of torch's operations for it."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = {weight.shape[1]: torch.randn(weight.shape[1], dtype=weight.dtype) for weight in weights}
    operations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mv": lambda weight, x: torch.mv(weight, x),
        "linear": lambda weight, x: functional.linear(x[None], weight),
        "oneDNN": lambda weight, x: torch.ops.mkldnn._linear_pointwise(x[None], weight, None, "none", [], ""),
    }

    def run(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        for weight in weights:
            operation(weight, vectors[weight.shape[1]])

    return {name: lambda operation=operation: run(operation) for name, operation in operations.items()}


def llama(model: CosmosAR) -> torch.nn.Module:
    """Transformers' model of the same sizes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    theirs = LlamaConfig(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        intermediate_size=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.share_embeddings_and_output_weights,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(theirs).to(config.params_dtype).eval()


if __name__ == "__main__":
    main()
