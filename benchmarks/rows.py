"""A step of each row of ALGORITHMS against a step of luffy's.

    python benchmarks/rows.py [ROW ...]        # CPU; prints the table of its README

Rows take turns in one process of one thread: sample, score without a verifier, and one update, from
the same weights, on the same 16 problems, each with a trace of 96 tokens. Each row has its own
groups. What is not here: the verifier, checkpoints, loading.
"""

import argparse
import copy
import random
import tempfile
from dataclasses import replace
from itertools import zip_longest

from tqdm import tqdm

from tiny import EOS, MAX_TOKENS, VOCABULARY, Ours, luffy, machine, save, show, show_head, spread

# What the benchmark sets for all rows alike
SIZES = dict(problems_per_step=16, updates_per_step=1, max_prompt_tokens=64, steps=100)
SIZES |= dict(max_response_tokens=MAX_TOKENS, entropy_coef=0.0, token_budget=2048, lr=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=[*luffy.ALGORITHMS])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    luffy.init_processes()
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(save(directory))
    rng = random.Random(0)
    for i, problem in ours.mine.items():
        trace = tuple(rng.randrange(2, VOCABULARY) for _ in range(95)) + (EOS,)
        ours.mine[i] = replace(problem, trace_ids=trace, trace_right=1.0, trace_reward=1.0)
    before = copy.deepcopy(ours.model.state_dict())
    seconds = {row: [] for row in dict.fromkeys(["luffy", *args.rows])}
    for step in tqdm(range(args.rounds + 1)):
        for row in seconds:
            ours.cfg = luffy.Config(**luffy.ALGORITHMS[row] | SIZES)
            ours.model.load_state_dict(before)
            taken = ours.step(step)["step"]
            if step:  # the first round warms up
                seconds[row].append(taken)
    print(f"{machine()}; {args.rounds} rounds, median (lowest to highest)\n")
    show_head(*2 * ("row", "seconds a step", "it / luffy"))
    cells = [
        (f"`{row}`", spread(taken), spread([a / b for a, b in zip(taken, seconds["luffy"])]))
        for row, taken in seconds.items()
    ]
    half = (len(cells) + 1) // 2
    for left, right in zip_longest(cells[:half], cells[half:], fillvalue=("", "", "")):
        show(*left, *right)


if __name__ == "__main__":
    luffy.launch(main)
