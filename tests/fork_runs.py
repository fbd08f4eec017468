"""What the tests of forks.orz and forks.prime share: runs in a process of their own."""

import json
import textwrap
from pathlib import Path

from conftest import run

TRAIN = textwrap.dedent("""
    import importlib, sys
    sys.path.insert(0, ".")
    from dataclasses import replace
    import luffy
    from machinery.processes import init_processes, launch

    def grade(trajectories, grader, tokenizer):  # an untrained model is never right
        for t in trajectories:
            t.right = t.reward = float(sum(t.response) % 3 == 0)

    def main():
        name, model, more, *runs = sys.argv[1:]
        fork = importlib.import_module(f"forks.{name}")
        made = getattr(fork, name.capitalize())()
        replaced = dict(Config=fork.Config, load=made.load, update=made.update, grade=grade)
        vars(luffy).update(replaced, report=lambda out: None)
        flags = "--problems_per_step 8 --max_response_tokens 32 --token_budget 300 --save_every 2"
        flags += " --lr 1e-3 --eval_data none --graders 1 --sample_every 100"
        cfg = luffy.parse_args(["--model", model, *flags.split(), *more.split()], algo=name)
        init_processes()
        for out, steps in zip(runs[::2], runs[1::2]):
            luffy.train(replace(cfg, out=out, steps=int(steps)), model)

    launch(main)
""")


def train(
    tmp_path: Path, name: str, model: Path, *runs: tuple[str, int], more: str = "", ranks: int = 1
) -> list:
    """Runs of a fork, (directory, steps) after (directory, steps) -> their metrics.jsonl."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    wanted = [x for out, steps in runs for x in (tmp_path / out, steps)]
    run(script, name, model, more, *wanted, ranks=ranks)
    files = [tmp_path / out / "metrics.jsonl" for out, _ in runs]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
