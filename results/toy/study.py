"""The study: every arm, five seeds, two kinds of base model; everything that results/ says.

    python results/toy/study.py            # all of it; killed and started again, it goes on
    python results/toy/study.py --quick    # one seed, with the learning rates of the full study
    python results/toy/study.py --report   # only tables and pictures, from the committed data/

A seed is a base model and all that is trained on it. A run's learning rate (for SFT also its
length, for `rl_sft` also the coefficient of the SFT loss) is chosen per arm and kind of base model,
on seed 0, by the mean of avg@8 over the easy and the hard problems of `val`. Final numbers are of
`test`, which nothing was chosen on. Runs are kept in runs/study, what the report needs in data/.
"""

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean as mean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import luffy  # noqa: E402
from data import encode, load_benchmarks, load_problems  # noqa: E402
from machinery import toy  # noqa: E402
from machinery.batches import collate  # noqa: E402
from machinery.files import read_jsonl, write  # noqa: E402
from machinery.model import Policy, from_pretrained, load_config, load_tokenizer  # noqa: E402
from machinery.processes import init_processes, seed_of  # noqa: E402
from machinery.samplers import TorchSampler  # noqa: E402
from machinery.scores import by_problem, respond  # noqa: E402
from verify import Grader  # noqa: E402

import report  # noqa: E402  isort: skip

# ------------------------------------------------------------------ what is run
KINDS = report.KINDS  # name -> GOALS, the toy's knob: nothing else differs
SEEDS = range(5)
COMMON = dict(eval_data="", save_every=50, sample_every=1000, graders=1)  # of every run
# Tried on val: three values from the third on, and the next one while that at an edge is best
LRS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
COEFFICIENTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of the SFT loss in rl_sft; the row has 0.1
SFT_STEPS, SFT_CHOICE = 400, (50, 100, 200, 400)  # 3, 6, 12 and 25 epochs
TIE = 1.5 / 1024  # one response more or less is no difference: then what is nearest to the defaults
SWEPT = ("rare",)  # bases for the sweep over γ
# label -> (row of ALGORITHMS, what else is changed). SFT + RL differs from on_policy in its base.
ARMS = {
    name: (name, {})
    for name in (
        "on_policy",
        "on_policy_noclip",
        "grpo",
        "mixed",
        "mixed_shaped",
        "luffy",
        "rl_sft",
    )
}
ARMS["sft"] = ("sft", {"steps": SFT_STEPS})
ARMS["sft_then_on_policy"] = ("on_policy", {})
SWEEP = {arm: ("luffy", {"gamma": g}) for g, arm in report.GAMMAS.items() if arm != "luffy"}
BASE_SECONDS, RUN_SECONDS = 60, 4  # to train a base model; around a run: measured, to estimate
TRACED = ("mixed", "mixed_shaped", "luffy")  # question (b)
FINAL = dict(split="test", temperature=0.6, samples=8, problems=600)
EXPLORED = ("base", "sft", "on_policy", "luffy", "sft_then_on_policy")  # question (e)
EXPLORE = [
    dict(split="test", temperature=t, samples=32 if t == 1 else 8, problems=150)
    for t in (0.2, 1.0, 1.4)
]  # every fourth problem of FINAL
VAL = dict(split="val", temperature=0.6, samples=8, problems=192)


# ------------------------------------------------------------------ jobs, in processes of their own
def start_worker() -> None:
    """One thread; and a worker does not outlive a study that is killed."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    init_processes()


def make_base(directory: Path, goals: float, seed: int) -> Path:
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            toy.save_base(directory, goals, seed)
    return directory


def configure(out: Path, arm: str, base: Path, seed: int, **tuned) -> luffy.Config:
    algo, changes = (ARMS | SWEEP)[arm]
    flags = COMMON | changes | tuned | dict(model=base, algo=algo, seed=seed, out=out)
    return luffy.parse_args([f"--{name}={value}" for name, value in flags.items()])


def train(cfg: luffy.Config) -> Path:
    """-> the last checkpoint. What is printed goes to the run's log."""
    out = Path(cfg.out)
    config, last = out / "config.json", out / f"checkpoint-{cfg.steps:06d}"
    if config.exists() and json.loads(config.read_text())["model"] != cfg.model:
        raise RuntimeError(f"{out} did not begin with {cfg.model}: remove it")
    if not last.exists() and not interrupted:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(f"{out}.log", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            luffy.check(cfg, 1)
            luffy.train(cfg, cfg.model)
    if not last.exists():  # Ctrl-C: the run was stopped, and this worker starts no other
        interrupted.append(out)
        raise RuntimeError(f"{out} was stopped; the same command goes on")
    return last


interrupted: list[Path] = []


def evaluate(
    checkpoint: Path, file: Path, split: str, temperature: float, samples: int, problems: int
) -> dict:
    """avg@samples, as counts of right responses for each problem."""
    if not file.exists():
        start = time.perf_counter()
        tokenizer, config = load_tokenizer(checkpoint), load_config(checkpoint)
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), Grader(1) as grader:
            asked = load_benchmarks([f"toy/{split}"], tokenizer, max_prompt_tokens=32)
            numbers = range(0, len(asked), len(asked) // problems)
            rows = respond(
                TorchSampler(checkpoint, config, [tokenizer.eos_token_id]),
                asked,
                numbers,
                grader,
                tokenizer,
                samples=samples,
                temperature=temperature,
                max_tokens=96,
                seeds=[seed_of("evaluation", 0, i) for i in range(len(asked))],
            )
        sources = defaultdict(list)
        for row in rows:
            sources[row["source"]].append(row)
        found = {
            "split": split,
            "temperature": temperature,
            "k": samples,
            "right": {
                s: [int(sum(r)) for r in by_problem(these).values()] for s, these in sources.items()
            },
            "length": {
                s: round(mean(r["tokens"] for r in these), 2) for s, these in sources.items()
            },
            "truncated": round(mean(r["truncated"] for r in rows), 4),
            "seconds": round(time.perf_counter() - start, 1),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(found))
    return json.loads(file.read_text())


def trace_probabilities(checkpoints: list[Path], base: Path, file: Path) -> None:
    """What each checkpoint gives to the hard training problems' traces, and at their forks.

    unlikely: mean π of the trace tokens that had π < 0.1 under the base model, always the same
    ones; go_on and stop: π of a third step, and of the box after the last step, in solutions
    without detours; solution: their mean log-prob.
    """
    if not file.exists():
        tokenizer = load_tokenizer(base)
        hard = [i for i, p in enumerate(load_problems("toy")) if p.source == "hard"]
        traces, _ = encode(
            load_problems("toy"), tokenizer, max_prompt_tokens=32, max_trace_tokens=96
        )
        chains = [chain for _, chain in toy.splits()["train"]]
        assert len(traces) == len(chains)  # none was dropped
        plain = [
            tokenizer.encode(toy.response(chain, chain.steps, random.Random(0), 0, 0))
            for chain in chains
        ]
        step = len("d=5-2=3;")

        def log_probs(path: Path, responses: list) -> list[torch.Tensor]:
            model = from_pretrained(path, config=load_config(path), attn_implementation="packed")
            rows = [luffy.Trajectory(i, traces[i], responses[i], off_policy=True) for i in hard]
            with torch.no_grad():
                batch = collate(rows)
                logps = Policy(model, 1.0)(batch)[0]
            return list(logps.split([len(t.response) for t in rows]))

        before = torch.cat(log_probs(base, [p.trace_ids for p in traces]))
        unlikely = before < torch.tensor(0.1).log()
        found = {"share_unlikely": unlikely.float().mean().item()}
        for path in [base, *checkpoints]:
            logp = torch.cat(log_probs(path, [p.trace_ids for p in traces]))
            solutions = log_probs(path, plain)
            key = path.name.split("-")[1].lstrip("0") if path in checkpoints else "0"
            found[key] = {
                "unlikely": logp[unlikely].exp().mean().item(),
                "go_on": mean(s[2 * step].exp().item() for s in solutions),
                "stop": mean(
                    s[chains[i].steps * step].exp().item() for i, s in zip(hard, solutions)
                ),
                "solution": mean(s.sum().item() for s in solutions),
            }
        write(file, json.dumps(found))


# ------------------------------------------------------------------ the order of the jobs
class Study:
    """Jobs by name, each done once; what needs another waits for it.

    A choice is what was tuned of an arm: its `lr`, for SFT also the `steps` after which to take its
    checkpoint, for rl_sft also its `sft_coef`.
    """

    def __init__(self, pool: ProcessPoolExecutor, root: Path, bar: tqdm, choices: dict):
        self.pool, self.root, self.bar, self.tasks = pool, root, bar, {}
        self.choices = choices  # of (kind, arm), where they are known already
        self.runs, self.finals, self.bases = {}, {}, {}  # directories -> what is in them

    def once(self, name, coroutine) -> asyncio.Task:
        """The task of this name, started at the first call."""
        if name in self.tasks:
            coroutine.close()
        else:
            self.tasks[name] = asyncio.ensure_future(coroutine)
        return self.tasks[name]

    async def job(self, function, *arguments):
        self.bar.total += 1
        result = await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)
        self.bar.update()
        return result

    def base(self, kind: str, seed: int) -> asyncio.Task:
        name = f"base-{KINDS[kind]:g}-{seed}"
        return self.once(name, self.job(make_base, self.root / name, KINDS[kind], seed))

    def run(self, kind: str, arm: str, seed: int, choice: dict) -> asyncio.Task:
        """-> the checkpoint of a run that counts"""
        flags = {k: v for k, v in choice.items() if k != "steps"}
        name = "-".join([arm, *(f"{k}{v:g}" for k, v in flags.items()), f"seed{seed}"])
        out = self.root / kind / name
        run = self.once(out, self.train(out, kind, arm, seed, flags))
        return self.once((out, choice.get("steps")), checkpoint(run, choice.get("steps")))

    async def train(self, out: Path, kind: str, arm: str, seed: int, flags: dict) -> Path:
        base = await self.base(kind, seed)
        if arm == "sft_then_on_policy":
            base = await self.run(kind, "sft", seed, await self.choice(kind, "sft"))
        self.runs[out] = kind, arm, seed, flags, base
        return await self.job(train, configure(out, arm, base, seed, **flags))

    def scores(self, model: Path, how: dict, out: Path | None = None) -> asyncio.Task:
        name = f"{model.name}-{how['split']}-t{how['temperature']:g}-k{how['samples']}.json"
        file = (out or model.parent) / name
        return self.once(file, self.job(evaluate, model, file, *how.values()))

    # -------------------------------------------------------------- choices, on val and seed 0
    def choice(self, kind: str, arm: str) -> asyncio.Task:
        return self.once(("choice", kind, arm), self.choose(kind, arm))

    async def choose(self, kind: str, arm: str) -> dict:
        if arm in SWEEP:  # luffy's
            return await self.choice(kind, "luffy")
        if (kind, arm) in self.choices:
            return self.choices[kind, arm]
        steps = [{"steps": n} for n in SFT_CHOICE] if arm == "sft" else [{}]
        choice = await self.climb(kind, arm, LRS, lambda lr: [{"lr": lr} | n for n in steps])
        if arm == "rl_sft":
            choice = await self.climb(
                kind,
                arm,
                COEFFICIENTS,
                lambda c: [
                    choice | ({"sft_coef": c} if c != luffy.ALGORITHMS[arm]["sft_coef"] else {})
                ],
            )
        return choice

    async def climb(self, kind: str, arm: str, ladder: tuple, choices) -> dict:
        """The best of choices(value) for the values tried."""
        low, high = 2, 5
        while True:
            tried = [choices(value) for value in ladder[low:high]]
            best = await self.best(kind, arm, sum(tried, []))
            if best in tried[0] and low > 0:
                low -= 1
            elif best in tried[-1] and high < len(ladder):
                high += 1
            else:
                return best

    async def best(self, kind: str, arm: str, choices: list[dict]) -> dict:
        values = await asyncio.gather(*(self.value(kind, arm, choice) for choice in choices))
        ties = [c for c, value in zip(choices, values) if value > max(values) - TIE]
        return min(
            ties,
            key=lambda c: (
                abs(math.log(c["lr"] / toy.RECIPE["lr"])),
                abs(math.log(c.get("sft_coef", 0.1) / 0.1)),
                c.get("steps", 0),
            ),
        )

    async def value(self, kind: str, arm: str, choice: dict) -> float:
        try:
            found = await self.scores(await self.run(kind, arm, 0, choice), VAL)
        except FloatingPointError:  # this learning rate is too high
            return -math.inf
        return mean(mean(found["right"][s]) / found["k"] for s in ("easy", "hard"))

    # -------------------------------------------------------------- the runs that are reported
    async def final(self, kind: str, arm: str, seed: int) -> None:
        out = None
        if arm == "base":
            model = await self.base(kind, seed)
            out = self.bases[kind, seed] = self.root / kind / model.name
        else:
            model = await self.run(kind, arm, seed, await self.choice(kind, arm))
            self.finals[model.parent] = int(model.name[-6:])
            if arm in TRACED:
                await self.job(
                    trace_probabilities,
                    checkpoints(model.parent),
                    await self.base(kind, seed),
                    model.parent / "traces.json",
                )
        hows = [(model, FINAL)]
        if arm in EXPLORED:
            hows += [(model, how) for how in EXPLORE]
        if arm in ("luffy", "sft_then_on_policy"):  # question (h): scores along the way
            hows += [(path, FINAL) for path in checkpoints(model.parent)[:-1]]
        await asyncio.gather(*(self.scores(path, how, out) for path, how in hows))


def checkpoints(out: Path) -> list[Path]:
    """Without those that an interrupted run saved in between."""
    found = sorted(out.glob("checkpoint-??????"))
    return [path for path in found if int(path.name[-6:]) % COMMON["save_every"] == 0]


async def checkpoint(run: asyncio.Task, steps: int | None) -> Path:
    """Of a run: the one after so many steps, or the last."""
    last = await run
    return last.with_name(f"checkpoint-{steps:06d}") if steps else last


async def everything(study: Study, seeds: list, *parts: tuple) -> None:
    """What is reported, one part after another: (arms, kinds of bases)."""
    for arms, kinds in parts:
        await asyncio.gather(
            *(study.final(kind, arm, seed) for arm in arms for seed in seeds for kind in kinds)
        )


# ------------------------------------------------------------------ what is kept
CURVES = (
    "reward/easy",
    "reward/hard",
    "entropy",
    "trace_prob",
    "trace_unlikely",
    "trace_f",
    "length",
    "grad_norm",
    "ratio_far",
    "groups/none",
    "skipped_updates",
)
PHASES = ("sample", "score", "update", "sync")
WINDOW = 5  # steps that are averaged for a point of a curve


def collect(study: Study, data: Path) -> None:
    """From the runs' directories to data/: runs, scores and probabilities of traces, a row each."""
    runs, scores, traces = [], [], []
    for out, (kind, arm, seed, flags, base) in sorted(study.runs.items()):
        cfg = json.loads((out / "config.json").read_text())
        differ = check_switches(arm, cfg, str(base), flags)
        what = {"kind": kind, "arm": arm, "seed": seed, "choice": flags}
        metrics = read_jsonl(out / "metrics.jsonl")
        timing = read_jsonl(out / "timing.jsonl")
        groups = cfg["problems_per_step"]
        runs.append(
            what
            | {
                "final": study.finals.get(out),
                "differs": differ,
                # summed up to each checkpoint: seconds on one core, and response tokens
                "seconds": {
                    n: round(sum(row[phase] for row in timing[:n] for phase in PHASES), 1)
                    for n in marks(cfg)
                },
                "sampled": {
                    n: sum(
                        round(row.get("length", 0) * cfg["rollouts"] * groups)
                        for row in metrics[:n]
                    )
                    for n in marks(cfg)
                },
                "updated": {
                    n: sum(
                        round(
                            row.get("length", 0) * cfg["rollouts"] * groups
                            + row.get("trace_length", 0) * cfg["traces"] * groups
                        )
                        for row in metrics[:n]
                    )
                    for n in marks(cfg)
                },
                "curves": {name: smooth(metrics, name) for name in CURVES if name in metrics[-1]}
                if out in study.finals
                else {},
            }
        )
        if arm in TRACED and out in study.finals:
            traces.append(what | json.loads((out / "traces.json").read_text()))
        scores += [
            what | {"step": int(file.name[11:17])} | json.loads(file.read_text())
            for file in sorted(out.glob("checkpoint-*-t*.json"))
        ]
    for (kind, seed), directory in sorted(study.bases.items()):
        scores += [
            {"kind": kind, "arm": "base", "seed": seed, "choice": {}, "step": 0}
            | json.loads(file.read_text())
            for file in sorted(directory.glob("*-t*.json"))
        ]
    chains = [chain for kind, chain in toy.splits()["test"] if kind == "hard"]
    tokenizer, hard = (
        toy.make_tokenizer(),
        [p for p in load_problems("toy/test") if p.source == "hard"],
    )
    plain = [toy.response(chain, chain.steps, random.Random(0), 0, 0) for chain in chains]
    teacher = {
        "tokens": mean(len(tokenizer.encode(p.trace)) + 1 for p in hard),  # with EOS
        "plain": mean(len(tokenizer.encode(text)) + 1 for text in plain),
    }
    data.mkdir(parents=True, exist_ok=True)
    write(data / "teacher.json", json.dumps(teacher))
    for name, rows in (("runs", runs), ("scores", scores), ("traces", traces)):
        write(
            data / f"{name}.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        )


def marks(cfg: dict) -> range:
    return range(cfg["save_every"], cfg["steps"] + 1, cfg["save_every"])


def smooth(metrics: list[dict], name: str) -> list[float | None]:
    windows = (metrics[i : i + WINDOW] for i in range(0, len(metrics), WINDOW))
    values = ([row[name] for row in window if name in row] for window in windows)
    return [float(f"{mean(v):.4g}") if v else None for v in values]


def check_switches(arm: str, cfg: dict, base: str, tuned: dict) -> dict:
    """-> the fields in which a run's config differs from luffy's on the same base model and seed.

    RuntimeError unless these are the fields of its row of ALGORITHMS and what was tuned, with their
    values, and nothing else. (The toy's RECIPE has the last word on sizes.)
    """
    algo, changes = (ARMS | SWEEP)[arm]
    row, other = (luffy.ALGORITHMS[name] for name in (algo, "luffy"))
    default = asdict(luffy.Config())
    switches = {k: row.get(k, default[k]) for k in row | other if k not in toy.RECIPE}
    luffys = asdict(configure(Path(cfg["out"]), "luffy", Path(base), cfg["seed"]))
    expected = luffys | switches | changes | tuned | {"algo": algo}
    if wrong := {k for k in expected if cfg[k] != expected[k]}:
        raise RuntimeError(
            f"{cfg['out']}: "
            + ", ".join(f"{k} is {cfg[k]!r}, should be {expected[k]!r}" for k in sorted(wrong))
        )
    return {k: v for k, v in cfg.items() if k != "algo" and v != luffys[k]}


# ------------------------------------------------------------------ the command line
def estimate(data: Path, quick: bool) -> str:
    """From the seconds of the committed study."""
    runs, scores = (read_jsonl(data / f"{name}.jsonl") for name in ("runs", "scores"))
    if not runs:
        return "no earlier study to estimate from"
    if quick:
        runs = [r for r in runs if r["final"] and r["seed"] == 0 and r["arm"] not in SWEEP]
        scores = [
            r for r in scores if r["split"] == "test" and r["seed"] == 0 and r["arm"] not in SWEEP
        ]
    seconds = sum(max(r["seconds"].values()) for r in runs) + sum(r["seconds"] for r in scores)
    seconds += RUN_SECONDS * len(runs) + BASE_SECONDS * len(KINDS) * (1 if quick else len(SEEDS))
    return (
        f"about {seconds / cores() / 60:.0f} minutes from the start, if these {cores()} cores "
        "are as fast as those of the committed study"
    )


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, without the sweep over γ, with the committed choices",
    )
    parser.add_argument("--report", action="store_true", help="only what is made from data/")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="[runs/study]")
    args = parser.parse_args()
    data = HERE / "data"
    if not args.report:
        print(estimate(data, args.quick), flush=True)
        all_arms = (["base", *ARMS], KINDS)
        study = run_study(
            args.runs,
            *(
                ([0], report.Report(data).choices(), all_arms)
                if args.quick
                else (SEEDS, {}, all_arms, (SWEEP, SWEPT))
            ),
        )
        collect(study, args.runs / "quick" if args.quick else data)
    if args.quick:
        found = report.Report(args.runs / "quick")
        for kind in KINDS:
            print(f"\n{kind} bases\n\n{found.arms_table(kind)}")
    else:
        report.write_all()


def run_study(root: Path, seeds: list, choices: dict, *parts: tuple) -> Study:
    """By as many processes as there are cores, of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"), start_worker) as pool,
        tqdm(total=0, desc="jobs so far known", smoothing=0) as bar,
    ):
        study = Study(pool, root, bar, choices)
        try:
            asyncio.run(everything(study, seeds, *parts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return study


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
