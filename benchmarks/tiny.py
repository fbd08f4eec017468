"""What the speed benchmarks share: a tiny Qwen2 that stops at random, our step, instruments.

Beside the tiny shape there is a real one, of any model's directory: 8 prompts of 58 tokens, sums,
with 8 samples each of up to 48 tokens.
"""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; torchrun does it for several

import torch
import transformers
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import luffy
from data import Problem
from machinery.model import load_config, load_model, load_tokenizer
from machinery.processes import barrier
from machinery.samplers import TorchSampler

EOS, VOCABULARY, MAX_TOKENS = 1, 512, 128
STOP = 0.0117  # the chance that a token is EOS: a mean of 67 tokens, of at most 128


# ------------------------------------------------------------------ the model
def save(directory: str | Path, *, vocabulary: int = VOCABULARY) -> str:
    """Save an untrained Qwen2 of 4 layers, width 256, 4 / 2 heads, and its tokenizer.

    The first channel is large and the same in all tokens, so the head's weight on it sets how
    likely EOS is. All other tokens are about equally likely.
    """
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.02 * 256**0.5
        model.lm_head.weight[:, 0] = 0.0
        first = model.model(torch.randint(2, vocabulary, (8, 128))).last_hidden_state[..., 0].mean()
        odds = torch.tensor(STOP / (1 - STOP) * vocabulary)
        model.lm_head.weight[EOS, 0] = odds.log() / first
    model.save_pretrained(directory)
    tokenizer = Qwen2Tokenizer(
        vocab={"<pad>": 0, "<eos>": EOS},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        bos_token=None,
    )
    tokenizer.add_tokens([AddedToken(f"<{i}>", normalized=False) for i in range(2, VOCABULARY)])
    tokenizer.save_pretrained(directory)
    return str(directory)


def prompts(n: int = 16, seed: int = 0) -> list[str]:
    """n prompts of 16 to 48 tokens."""
    rng = random.Random(seed)
    return [
        "".join(f"<{rng.randrange(2, VOCABULARY)}>" for _ in range(rng.randint(16, 48)))
        for _ in range(n)
    ]


def sums(n: int, tokenizer, tokens: int = 58, seed: int = 0) -> list[str]:
    """n prompts, additions in the model's chat template if it has one, of `tokens` or just less."""
    rng = random.Random(seed)

    def prompt(numbers: list[int]) -> str:
        text = f"What is {' + '.join(map(str, numbers))}?"
        if not tokenizer.chat_template:
            return text
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def number() -> int:
        return rng.randint(10, 99)

    def grow() -> str:
        numbers = [number()]
        ways = [lambda: [*numbers, number()], lambda: [*numbers[:-1], 10 * numbers[-1] + 7]]
        for longer in ways:  # then digits of the last one
            while len(tokenizer(prompt(more := longer()))["input_ids"]) <= tokens:
                numbers = more
        return prompt(numbers)

    return [grow() for _ in range(n)]


class Shape(NamedTuple):
    """Of a step: so many prompts, 8 samples each."""

    problems: int
    max_tokens: int  # of a sample
    texts: Callable  # of number, tokenizer -> prompts


SHAPES = {"tiny": Shape(16, MAX_TOKENS, lambda n, _: prompts(n)), "real": Shape(8, 48, sums)}


def reward(text: str) -> float:
    """Costs nothing, and hardly ever the same in a whole group."""
    return len(text) / 1000


class Lengths:
    """In place of the verifier: `reward`."""

    failures = Counter()

    def right_and_reward(self, jobs: list[tuple[str, str]]) -> list[tuple[float, float]]:
        return [(1.0, reward(text)) for text, _ in jobs]


# ------------------------------------------------------------------ our step
class Ours:
    """luffy.train, a step at a time: Dr. GRPO without clipping, one update."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, model: str, shape: str = "tiny", **changes):
        size = SHAPES[shape]
        recipe = dict(
            model=model,
            problems_per_step=size.problems,
            updates_per_step=1,
            max_prompt_tokens=64,
            max_response_tokens=size.max_tokens,
            entropy_coef=0.0,
            token_budget=512,
            checkpointing=False,
            sampler="torch",
        )
        self.cfg = luffy.Config(**luffy.ALGORITHMS["on_policy_noclip"] | recipe | changes)
        self.tokenizer = load_tokenizer(model)
        config = load_config(model)
        self.problems = [
            Problem(text, "", prompt_ids=self.tokenizer(text)["input_ids"])
            for text in size.texts(self.cfg.problems_per_step, self.tokenizer)
        ]
        self.mine = luffy.my_share(self.problems)
        self.model = load_model(model, config, self.cfg.checkpointing)
        ends = [self.tokenizer.eos_token_id]
        self.sampler = TorchSampler(model, config, ends, of=self.model)
        self.policy = luffy.data_parallel(luffy.Policy(self.model, 1.0))
        self.optimizer = luffy.ShardedAdamW(self.policy.parameters(), lr=1e-6)

    def step(self, number: int) -> dict:
        """-> seconds of each phase by `clock`, CPU seconds, sampled tokens, `trajectories`.

        CPU seconds and tokens are those of all ranks.
        """
        start, cpu = self.clock(), time.process_time()
        self.sampler.push(self.model.named_parameters())
        trajectories = luffy.rollout(self.sampler, self.mine, number, self.cfg)
        barrier()  # sampling takes as long as on the slowest rank
        sampled = self.clock()
        luffy.score(trajectories, Lengths(), self.tokenizer, self.cfg)
        scored = self.clock()
        luffy.update(self.policy, self.optimizer, trajectories, self.cfg)
        tokens = luffy.all_reduce(sum(len(t.response) for t in trajectories))
        done = self.clock()
        return {
            "sample": sampled - start,
            "score": scored - sampled,
            "update": done - scored,
            "step": done - start,
            "cpu": luffy.all_reduce(time.process_time() - cpu),
            "tokens": tokens,
            "trajectories": trajectories,
        }


# ------------------------------------------------------------------ instruments
class PeakMemory:
    """`bytes` is how far this process's resident memory rose above where it was (Linux)."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
        self.before = self.read("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = self.read("VmHWM") - self.before

    def read(self, name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def matrix_rate(seconds: float = 0.5) -> float:
    """FLOP a CPU second of large float32 matrix products on one thread: the median."""
    a, b = torch.randn(2, 1024, 1024).unbind()
    rates, end = [], time.process_time() + seconds
    while time.process_time() < end:
        start = time.process_time()
        torch.mm(a, b)
        rates.append(2 * 1024**3 / (time.process_time() - start))
    return statistics.median(rates)


def in_process(*args, ranks: int = 1) -> dict:
    """Run a benchmark script in a process (or `ranks` of torchrun) -> the JSON it prints last."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    done = subprocess.run([*launcher, *map(str, args)], text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], form: str = ".2f") -> str:
    """Median (lowest to highest)."""
    median, low, high = (format(f(values), form) for f in (statistics.median, min, max))
    return f"{median} ({low} to {high})"


def show(*cells: object) -> None:
    """A row of a table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def show_head(*cells: str) -> None:
    show(*cells)
    print("|---" * len(cells) + "|", flush=True)


def machine() -> str:
    """One line for a table's caption."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return (
        f"{date.today()}, {os.cpu_count()} cores ({name}), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, float32, "
        f"{torch.get_num_threads()} thread a process"
    )
