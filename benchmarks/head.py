"""The vocabulary head: token_logprobs against plain log_softmax, in memory, time and gradients.

    python benchmarks/head.py        # CPU, three minutes; prints the table of its README

Each measurement is a process of its own. Peak memory is what one forward and backward pass adds to
the resident memory of a process that already holds the hidden states, the head and the gradients
of both. Times are of the two variants in turn; ratios are medians of pairs.
"""

import argparse
import json
import statistics
import time

from tiny import PeakMemory, in_process, machine, torch
from machinery.model import token_logprobs  # tiny knows where it is
from machinery.printing import print_what_can_be

VOCABULARY, WIDTH = 151_936, 896  # Qwen2.5's


def plain(hidden, weight, targets):
    logp = torch.log_softmax(hidden @ weight.T, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


VARIANTS = {"plain": plain, "chunked": token_logprobs}


def measure(variant: str, tokens: int) -> dict:
    """One forward and backward pass in this process -> {seconds, bytes}."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,))
    hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    with PeakMemory() as peak:
        start = time.process_time()
        logp, entropy = VARIANTS[variant](hidden, weight, targets)
        (-logp.mean() - 1e-3 * entropy.mean()).backward()
        seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": peak.bytes}


def gradient_error() -> float:
    """Largest relative difference of the gradients in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*size, dtype=torch.float64, generator=generator)
        for size in ((1000, 16), (50, 16))
    )  # two chunks
    targets = torch.randint(50, (1000,), generator=generator)
    a, b = torch.randn(2, 1000, dtype=torch.float64, generator=generator)
    grads = []
    for variant in VARIANTS.values():
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        logp, entropy = variant(*inputs, targets)
        grads.append(torch.autograd.grad(logp @ a + entropy @ b, inputs))
    return max(((x - y).norm() / x.norm()).item() for x, y in zip(*grads))


def main() -> None:
    print_what_can_be()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return

    def run(variant: str, tokens: int) -> dict:
        return in_process(__file__, "--one", variant, tokens)

    pairs = [(run("plain", 1024), run("chunked", 1024)) for _ in range(args.pairs)]
    long = [run("chunked", 4096) for _ in range(args.pairs)]
    median = {
        key: [statistics.median(row[key] for row in rows) for rows in (*zip(*pairs), long)]
        for key in ("seconds", "bytes")
    }
    print(f"{machine()}; V = {VOCABULARY:,}, D = {WIDTH}; medians of {args.pairs}\n")
    print("| | tokens | peak, MiB | CPU seconds |\n|---|---|---|---|")
    for name, tokens, size, seconds in zip(
        ("plain", "chunked", "chunked"), (1024, 1024, 4096), median["bytes"], median["seconds"]
    ):
        print(f"| {name} | {tokens} | {size / 2**20:,.0f} | {seconds:.1f} |")
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    memory = median["bytes"][1] / median["bytes"][0]
    print(
        f"\nchunked / plain at 1024 tokens: memory {memory:.2f}, "
        f"time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"gradients in float64 differ by {gradient_error():.0e}"
    )


if __name__ == "__main__":
    main()
