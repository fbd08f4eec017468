"""TorchSampler against transformers' generate and, where it is installed, vLLM's CPU build.

    python benchmarks/sampler.py        # CPU, fifteen minutes; prints a table of its README

Each samples 8 responses of up to 128 tokens, which stop at random, to each of 4, 16 and 64 prompts
of the same tiny Qwen2: float32, in one process of one thread, in turns, with a first turn to warm
up. generate repeats the prompts and goes on until all responses are done; it returns no log-probs.
"""

import argparse
import os
import tempfile
import time
from importlib.util import find_spec

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")  # one thread for vLLM, too

from tiny import EOS, MAX_TOKENS, luffy, machine, prompts, save, spread, torch
from tqdm import tqdm
from transformers import GenerationConfig

from machinery.model import from_pretrained, load_config, load_tokenizer
from machinery.samplers import TorchSampler


class Generate:
    """transformers' own loop behind the interface of our samplers, as far as the benchmark goes."""

    def __init__(self, path: str):
        self.model = from_pretrained(path, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def generate(
        self, prompts: list, n: int, *, seeds: list[int], temperature: float, max_tokens: int
    ) -> int:
        """-> the number of tokens."""
        torch.manual_seed(seeds[0])
        width = max(map(len, prompts))
        ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts])
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
                eos_token_id=EOS,
                pad_token_id=0,
            ),
        )[:, width:]
        return int(((out == EOS).cumsum(1).cumsum(1) <= 1).sum())  # up to the first EOS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    luffy.init_processes()
    with tempfile.TemporaryDirectory() as directory:
        path = save(directory)
        config = load_config(path)
        samplers = {
            "transformers' generate": Generate(path),
            "TorchSampler": TorchSampler(path, config, [EOS]),
        }
        if find_spec("vllm"):
            samplers["VLLMSampler"] = luffy.VLLMSampler(path, config, [EOS], 64 + MAX_TOKENS, 2**30)
        tokenizer = load_tokenizer(path)
        model = from_pretrained(path)
    for sampler in list(samplers.values())[1:]:
        sampler.push(model.named_parameters())
    rates = {(rows, name): [] for rows in (32, 128, 512) for name in samplers}
    for number in tqdm(range(args.rounds + 1)):
        for rows, name in rates:
            questions = [tokenizer(p)["input_ids"] for p in prompts(rows // 8)]
            start = time.perf_counter()
            out = samplers[name].generate(
                questions,
                8,
                seeds=[1000 * number + i for i in range(len(questions))],
                temperature=1.0,
                max_tokens=MAX_TOKENS,
            )
            seconds = time.perf_counter() - start
            tokens = out if isinstance(out, int) else sum(len(s.tokens) for g in out for s in g)
            if number:
                rates[rows, name].append(tokens / seconds)
    print(f"{machine()}; {args.rounds} rounds, median (lowest to highest)\n")
    print("| responses asked for | | tokens/s | it / generate |\n|---|---|---|---|")
    for (rows, name), mine in rates.items():
        ratios = [a / b for a, b in zip(mine, rates[rows, "transformers' generate"])]
        print(f"| {rows} | {name} | {spread(mine, ',.0f')} | {spread(ratios)} |")


if __name__ == "__main__":
    luffy.launch(main)
