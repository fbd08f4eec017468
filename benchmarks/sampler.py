"""TorchSampler against transformers' generate and, where it is installed, vLLM's CPU build.

    python benchmarks/sampler.py [--model DIR]   # CPU, fifteen minutes; a table of its README

Each samples 8 responses of up to 128 tokens, which stop at random, to each of 4, 16 and 64 prompts
of the same tiny Qwen2: float32, in one process of one thread, in turns, with a first turn to warm
up. generate repeats the prompts and goes on until all responses are done; it returns no log-probs.
With --model also 8 responses of up to 48 tokens to each of 8 made-up prompts of 58, by that model.
Seconds are those of a processor, which other work on the machine hardly changes, unless vLLM with
its processes takes part.
"""

import argparse
import os
import random
import tempfile
import time
from importlib.util import find_spec

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")  # one thread for vLLM, too

from tiny import EOS, MAX_TOKENS, luffy, machine, prompts, save, spread, torch
from tqdm import tqdm
from transformers import GenerationConfig

from machinery.model import end_ids, from_pretrained, load_config, load_tokenizer
from machinery.samplers import TorchSampler


class Generate:
    """transformers' own loop behind the interface of our samplers, as far as the benchmark goes."""

    def __init__(self, path: str, ends: list[int]):
        self.model = from_pretrained(path, attn_implementation="sdpa").eval()
        self.ends = ends

    @torch.inference_mode()
    def generate(
        self, prompts: list, n: int, *, seeds: list[int], temperature: float, max_tokens: int
    ) -> int:
        """-> the number of tokens."""
        torch.manual_seed(seeds[0])
        width = max(map(len, prompts))
        ids = torch.tensor([self.ends[:1] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = self.model.generate(
            input_ids=ids.repeat_interleave(n, 0),
            attention_mask=mask.repeat_interleave(n, 0),
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0],
            ),
        )[:, width:]
        ended = torch.isin(out, torch.tensor(self.ends))
        return int((ended.cumsum(1).cumsum(1) <= 1).sum())  # up to the first end


def measure(
    path: str, ends: list[int], asked: list[list[list[int]]], max_tokens: int, rounds: int
) -> None:
    """Print a row for each list of prompts and each sampler."""
    config, model = load_config(path), from_pretrained(path)
    samplers = {
        "transformers' generate": Generate(path, ends),
        "TorchSampler": TorchSampler(path, config, ends),
    }
    if find_spec("vllm"):
        samplers["VLLMSampler"] = luffy.VLLMSampler(path, config, ends, 64 + max_tokens, 2**30)
    clock = time.perf_counter if find_spec("vllm") else time.process_time
    for sampler in list(samplers.values())[1:]:
        sampler.push(model.named_parameters())
    rates = {(i, name): [] for i in range(len(asked)) for name in samplers}
    for number in tqdm(range(rounds + 1)):
        for i, name in rates:
            start = clock()
            out = samplers[name].generate(
                asked[i],
                8,
                seeds=[1000 * number + j for j in range(len(asked[i]))],
                temperature=1.0,
                max_tokens=max_tokens,
            )
            seconds = clock() - start
            tokens = out if isinstance(out, int) else sum(len(s.tokens) for g in out for s in g)
            if number:
                rates[i, name].append(tokens / seconds)
    for (i, name), mine in rates.items():
        ratios = [a / b for a, b in zip(mine, rates[i, "transformers' generate"])]
        what = f"{model.config.vocab_size:,} | {8 * len(asked[i])} | {name}"
        print(f"| {what} | {spread(mine, ',.0f')} | {spread(ratios)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a directory: its shape, too")
    args = parser.parse_args()
    luffy.init_processes()
    print(f"{machine()}; {args.rounds} rounds, median (lowest to highest)\n")
    print("| words | responses asked for | | tokens/s | it / generate |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        path = save(directory)
        tokenizer = load_tokenizer(path)
        asked = [[tokenizer(p)["input_ids"] for p in prompts(n)] for n in (4, 16, 64)]
        measure(path, [EOS], asked, MAX_TOKENS, args.rounds)
    if args.model:
        ends, size = end_ids(args.model, load_tokenizer(args.model)), load_config(args.model)
        words = range(max(ends) + 1, size.vocab_size)
        asked = [[random.Random(i).choices(words, k=58) for i in range(8)]]
        measure(args.model, ends, asked, 48, args.rounds)


if __name__ == "__main__":
    luffy.launch(main)
