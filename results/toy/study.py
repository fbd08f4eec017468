"""The study: rows of ALGORITHMS, forks and weights of trace tokens, on the toy, several seeds.

    python results/toy/study.py            # all that is not in data/ yet; hours, it may be killed
    python results/toy/study.py --quick    # one seed of one kind, with these choices; half an hour
    python results/toy/study.py --report   # only tables and pictures, from data/

A seed is a base model and all that is trained on it. An arm has seven candidates: four learning
rates, then, at the best of them, three values more of what is its own (OWN). The best on `val`,
seed 0 of `frequent` bases, by the mean of avg@8 over easy, medium and hard problems, is then run
with all seeds, on `rare` ones, too. Final numbers are of `test`, which no setting was chosen on.

A job is a run and its evaluations, in a process of its own. It ends with rows in data/runs.jsonl
and data/scores.jsonl, and what has its row there is not run again: to repeat all, remove data/
and runs/study, where models and logs are. A first stage that is gone from there is trained anew.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import threading
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import fmean as mean
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from tqdm import tqdm  # noqa: E402

import luffy  # noqa: E402
from data import load_benchmarks, load_problems  # noqa: E402
from machinery import processes, toy  # noqa: E402
from machinery.processes import InputError  # noqa: E402
from machinery.files import append, lock, read_jsonl, to_jsonl, write  # noqa: E402
from machinery.model import load_config, load_tokenizer  # noqa: E402
from machinery.samplers import TorchSampler  # noqa: E402
from machinery.scores import by_problem, respond  # noqa: E402
from verify import Grader  # noqa: E402

import report  # noqa: E402  isort: skip

# ------------------------------------------------------------------ what is run
KINDS = report.KINDS  # name -> GOALS, the toy's knob: nothing else differs
COMMON = dict(eval_data="", save_every=50, sample_every=1000, graders=1)  # of every run
W = {f"w_{name}": name for name in ("none", "log", "trsft", "phi")}  # else as luffy
FORKS = dict(trapo="trapo", relift="relift", exgrpo="exgrpo", opd="opd", prime="prime", orz="orz")
FORKS |= dict(dapo_refill="dapo")  # arm -> module
FIRST = report.FIRST
ROWS = {"sft_then_on_policy": "on_policy"}  # arm -> row of ALGORITHMS, where names differ
ARMS = report.ARMS[1:]
RATES = report.RATES
# What is an arm's own: flag -> the arms, and three values beside their row's
OWN: dict[str, tuple[str, tuple]] = {
    "gamma": ("luffy mixed_shaped sft_shaped trsft trapo w_trsft", (0.03, 0.3, 1.0)),
    "clip": (
        "on_policy on_policy_shaped grpo mixed sft_then_on_policy reinforce_pp opd prime orz",
        (0.05, 0.1, 0.4),
    ),
    "clip_high": ("dapo dapo_refill cispo rl_2604", (0.2, 0.4, 1.0)),
    "steps": ("sft sft_2604 dft", (50, 100, 400)),
    "prefix_learns": ("prefix_rft", (0.05, 0.5, 1.0)),
    "sft_lr": ("relift", (3e-5, 1e-4, 1e-3)),
    "sft_coef": (
        "rl_sft hpt hpt_2 chord_phi srft srft_plus uft",
        (0.1, 0.3, 3.0),
    ),  # times its row's
    "lr": ("", (0.56, 0.75, 1.8)),  # times the best rate: of arms that have nothing else
}
CURVES = "reward reward/easy reward/medium reward/hard entropy length trace_prob trace_unlikely"
CURVES += " ratio_far groups/none grad_norm"
PHASES = ("sample", "score", "update", "sync")
WINDOW = 5  # steps that are averaged for a point of a curve


def row_of(arm: str) -> dict:
    """An arm's row of ALGORITHMS; those of W and FORKS are put there.

    Those of W differ from luffy's in w alone, its Z included.
    """
    if arm in W:
        shaping = luffy.SHAPINGS[W[arm]]
        luffy.SHAPINGS[arm] = shaping._replace(is_sft=False)
        luffy.ALGORITHMS[arm] = luffy.ALGORITHMS["luffy"] | dict(shaping=arm)
    if arm in FORKS:
        __import__(f"forks.{FORKS[arm]}")
    return luffy.ALGORITHMS[ROWS.get(arm, arm)]


def more(arm: str, rate: float) -> list[dict]:
    """Three candidates beside the four rates, at the best of those."""
    flag = next((flag for flag, (arms, _) in OWN.items() if arm in arms.split()), "lr")
    times = {"lr": rate, "sft_coef": row_of(arm).get("sft_coef", 1.0)}.get(flag, 1)
    return [
        {"lr": rate} | {flag: float(f"{x * times:.3g}") if times != 1 else x} for x in OWN[flag][1]
    ]


# Jobs are forks of a process that has imported everything: imports would be a tenth of their time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["__main__", "transformers.models.qwen2.modeling_qwen2"])


# ------------------------------------------------------------------ a job, in a process of its own
def flags_of(arm: str, base: Path, seed: int, out: Path, choice: dict, **other: Any) -> list[str]:
    flags = COMMON | choice | dict(model=base, seed=seed, out=out, algo=ROWS.get(arm, arm)) | other
    return [f"--{name}={value}" for name, value in flags.items()]


def train(arm: str, argv: list[str]) -> None:
    """By the same main as the command's; a fork's module is run as if it were the command."""
    row_of(arm)
    luffy.report = lambda out: None  # no pages
    processes.launch = luffy.launch = lambda main: main()  # which would end this process
    sys.argv = ["luffy.py", *argv]
    if arm in FORKS:
        runpy.run_module(f"forks.{FORKS[arm]}", run_name="__main__")
    else:
        luffy.main()


def evaluate(model: Path, split: str, temperature: float, k: int, every: int) -> dict:
    """avg@k of every n-th problem, as counts of right responses for each."""
    tokenizer, config = load_tokenizer(model), load_config(model)
    asked = load_benchmarks(f"toy/{split}", tokenizer, max_prompt_tokens=32)
    sampler = TorchSampler(str(model), config, [tokenizer.eos_token_id])
    how: Any = dict(samples=k, temperature=temperature, max_tokens=96)
    how |= dict(seeds=[processes.seed_of("evaluation", 0, i) for i in range(len(asked))])
    with Grader(1) as grader:
        rows = respond(sampler, asked, range(0, len(asked), every), grader, tokenizer, **how)
    sources = defaultdict(list)
    for row in rows:
        sources[row["source"]].append(row)
    return {
        **dict(split=split, temperature=temperature, k=k, every=every),
        "right": {s: [round(sum(r)) for r in by_problem(x).values()] for s, x in sources.items()},
        "length": {s: round(mean(r["tokens"] for r in x), 2) for s, x in sources.items()},
        "truncated": round(mean(r["truncated"] for r in rows), 4),
    }


def run_row(out: Path, seconds: float) -> dict:
    """What is kept of a run."""
    cfg = json.loads((out / "config.json").read_text())
    metrics, timing = (read_jsonl(out / f"{name}.jsonl") for name in ("metrics", "timing"))
    marks = range(cfg["save_every"], cfg["steps"] + 1, cfg["save_every"])
    took = [sum(row.get(phase, 0) for phase in PHASES) for row in timing]
    sampled = [row.get("length", 0) * cfg["rollouts"] * cfg["problems_per_step"] for row in metrics]
    traces = [
        row.get("trace_length", 0) * cfg["traces"] * cfg["problems_per_step"] for row in metrics
    ]
    updated = [sum(both) for both in zip(sampled, traces)]
    return {
        "differs": differences(cfg),
        "steps": cfg["steps"],
        # CPU time: other programs change it less than the clock's.
        "seconds": {n: round(seconds * sum(took[:n]) / sum(took), 1) for n in marks},
        "sampled": {n: round(sum(sampled[:n])) for n in marks},
        "updated": {n: round(sum(updated[:n])) for n in marks},
        "curves": {name: smooth(metrics, name) for name in CURVES.split()},
    }


def smooth(metrics: list[dict], name: str) -> list[float | None]:
    windows = (metrics[i : i + WINDOW] for i in range(0, len(metrics), WINDOW))
    values = ([row[name] for row in window if name in row] for window in windows)
    return [float(f"{mean(v):.4g}") if v else None for v in values]


def differences(cfg: dict) -> dict:
    """The fields in which a run's config differs from luffy's on the same base model and seed."""
    same = {f"--{name}={cfg[name]}" for name in (*COMMON, "model", "seed", "out")}
    luffys = asdict(luffy.parse_args(sorted(same)))
    names = (k for k in luffys if k not in ("algo", "teacher"))  # the teacher is a path
    return {k: cfg[k] for k in names if cfg[k] != luffys[k]}


def evaluation(row: dict) -> list:
    """Which one of a run's it is; all None: its row in runs.jsonl."""
    return [row.get(name) for name in ("split", "step", "temperature")]


def do(job: dict) -> None:
    """A job: writes its rows to job["rows"], complete or not at all."""
    arm, out, model = job["arm"], Path(job["out"]), Path(job["base"])
    rows: dict[str, list] = {"runs": [], "scores": []}
    if arm == "base":
        if not model.exists():
            model.parent.mkdir(parents=True, exist_ok=True)
            toy.save_base(model, KINDS[job["kind"]], job["seed"])
        processes.init_processes()
        finals = [model]
    else:
        shutil.rmtree(out, ignore_errors=True)  # of a study that was killed: its time is not known
        start, teacher = sum(os.times()[:4]), {"teacher": job["teacher"]} if job["teacher"] else {}
        argv = flags_of(arm, model, job["seed"], out, job["choice"], **teacher)
        try:
            train(arm, argv)
        except FloatingPointError as error:  # this learning rate is too high
            rows["runs"].append({"failed": str(error)[:200]})
        else:
            rows["runs"].append(run_row(out, sum(os.times()[:4]) - start))
            finals = sorted(out.glob("checkpoint-??????"))
        if rows["runs"][0].get("failed"):
            finals = []
    for path in finals:
        step, last = 0 if arm == "base" else int(path.name[-6:]), path is finals[-1]
        hows = [("test", 0.6, 8, 1)] if last else [("test", 0.6, 4, 2)]
        if last and job["seed"] == 0 and arm != "base":
            hows += [("val", 0.6, 8, 1)] * (job["kind"] == report.TUNED)
        if last and arm in report.EXPLORED and (job["seed"] or arm == "base"):
            hows += [("test", 0.2, 8, 4), ("test", 1.0, 16, 4), ("test", 1.4, 8, 4)]
        rows["scores"] += [{"step": step} | evaluate(path, *how) for how in hows]
    write(Path(job["rows"]), json.dumps(rows))


def do_alone(job: dict, log: Path) -> None:
    """A job, in a process of its own that does not outlive a study that is killed."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    study = multiprocessing.parent_process()  # not the server, which lives while it has children

    def follow() -> None:
        study.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    do(job)
    os._exit(0)  # at the usual exit gloo aborts, now and then


# ------------------------------------------------------------------ the order of the jobs
class Study:
    """Jobs by name, each done once; what needs another's model waits for it."""

    def __init__(self, root: Path, data: Path, bar: tqdm, choices: dict):
        self.root, self.data, self.bar, self.choices = root, data, bar, choices
        self.tasks: dict[Any, asyncio.Task] = {}
        self.slots = asyncio.Semaphore(cores())
        lock(data)
        self.runs, self.scores = (read_jsonl(data / f"{n}.jsonl") for n in ("runs", "scores"))
        for name, rows in (("runs", self.runs), ("scores", self.scores)):
            write(data / f"{name}.jsonl", to_jsonl(rows))  # without half a row at the end

    def once(self, name: Any, coroutine: Any) -> asyncio.Task:
        """The task of this name, started at the first call."""
        if name in self.tasks:
            coroutine.close()
        else:
            self.tasks[name] = asyncio.ensure_future(coroutine)
        return self.tasks[name]

    def out(self, kind: str, arm: str, seed: int, choice: dict) -> Path:
        flags = [f"{k}{v:g}" for k, v in choice.items()]
        return self.root / kind / "-".join([arm, *flags, f"seed{seed}"])

    def model(self, kind: str, arm: str, seed: int, choice: dict) -> asyncio.Task:
        """-> the directory of a base model, or of a run's last checkpoint"""
        what = dict(kind=kind, arm=arm, seed=seed, choice=choice)
        return self.once(str(("model", what)), self.made(what))

    async def made(self, what: dict) -> Path:
        out = self.out(**what)
        if what["arm"] == "base":
            if not out.exists():
                await self.job(what)
            return out
        steps = what["choice"].get("steps", toy.RECIPE["steps"])
        checkpoint = out / f"checkpoint-{steps:06d}"
        if not (checkpoint.exists() and self.has_rows(what)):
            await self.job(what)
        if not checkpoint.exists():
            raise InputError(f"{out}: a first stage that did not come to an end; see its log")
        return checkpoint

    def result(self, kind: str, arm: str, seed: int, choice: dict) -> asyncio.Task:
        """Its rows are in data/ when this is done."""
        what = dict(kind=kind, arm=arm, seed=seed, choice=choice)
        return self.once(str(("rows", what)), self.known(what))

    async def known(self, what: dict) -> None:
        if not self.has_rows(what):
            await self.job(what)

    def has_rows(self, what: dict) -> bool:
        rows = self.scores if what["arm"] == "base" else self.runs  # what is written last
        return any(what.items() <= row.items() for row in rows)

    def job(self, what: dict) -> asyncio.Task:
        return self.once(str(("job", what)), self.do(what))

    async def do(self, what: dict) -> None:
        kind, arm, seed = what["kind"], what["arm"], what["seed"]
        self.bar.total += 1
        self.bar.refresh()
        out = self.out(**what)
        base = out if arm == "base" else await self.model(kind, "base", seed, {})
        teacher = None
        if first := FIRST.get(arm):
            stage = await self.model(kind, first, seed, await self.choice(first))
            base, teacher = (base, stage) if arm == "opd" else (stage, None)
        job = what | dict(base=str(base), out=str(out), teacher=teacher and str(teacher))
        rows = out.with_name(f"{out.name}.rows.json")
        job |= {"rows": str(rows)}
        if not rows.exists():
            async with self.slots:
                await self.process(job, out.with_name(f"{out.name}.log"))
        found = json.loads(rows.read_text())
        for name, known in (("scores", self.scores), ("runs", self.runs)):
            old = [evaluation(row) for row in known if what.items() <= row.items()]
            new = [what | row for row in found[name] if evaluation(row) not in old]
            known += new
            append(self.data / f"{name}.jsonl", *new)
        rows.unlink()
        if arm != "base" and arm not in FIRST.values():
            shutil.rmtree(out, ignore_errors=True)  # what nobody begins with
        self.bar.update()

    async def process(self, job: dict, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        running = SERVER.Process(target=do_alone, args=(job, log))
        running.start()
        await asyncio.to_thread(running.join)
        if running.exitcode:
            raise InputError(f"a job failed: see the end of {log}")

    # -------------------------------------------------------------- choices, on val and seed 0
    def choice(self, arm: str) -> asyncio.Task:
        return self.once(("choice", arm), self.choose(arm))

    async def choose(self, arm: str) -> dict:
        if arm == "base":
            return {}
        if arm in self.choices:
            return self.choices[arm]
        kind = report.TUNED
        rates = [{"lr": rate} for rate in RATES]
        await asyncio.gather(*(self.result(kind, arm, 0, choice) for choice in rates))
        tried = report.chosen([row for row in self.scores if row["choice"] in rates])
        if arm not in tried:
            raise InputError(f"{arm}, {kind} bases: none of the rates {RATES} came to an end")
        own = more(arm, tried[arm]["lr"])
        await asyncio.gather(*(self.result(kind, arm, 0, choice) for choice in own))
        return report.chosen(self.scores)[arm]

    async def final(self, kind: str, arm: str, seed: int) -> None:
        await self.result(kind, arm, seed, await self.choice(arm))


async def everything(study: Study, waves: list[tuple[tuple, range]], kinds: Any = KINDS) -> None:
    """What matters more first: (arms, seeds)."""
    for arms, seeds in waves:
        every = ((kind, arm, seed) for seed in seeds for arm in arms for kind in kinds)
        await asyncio.gather(*(study.final(*what) for what in every))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_teacher(data: Path) -> None:
    """Tokens of its traces of hard test problems, and how many of them are needed."""
    chains = [chain for kind, chain in toy.splits()["test"] if kind == "hard"]
    hard = [p for p in load_problems("toy/test") if p.source == "hard"]
    plain = [toy.response(chain, chain.steps, random.Random(0), 0, 0) for chain in chains]
    texts, encode = {"tokens": [p.trace for p in hard], "plain": plain}, toy.make_tokenizer().encode
    found = {name: mean(len(encode(t)) + 1 for t in some) for name, some in texts.items()}
    write(data / "teacher.json", json.dumps(found))  # with EOS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    alone = parser.add_mutually_exclusive_group()
    quick = "one seed of one kind, with the full study's choices as far as they are made"
    alone.add_argument("--quick", action="store_true", help=quick)
    alone.add_argument("--report", action="store_true", help="only what is made from data/")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/study", help="[runs/study]")
    args = parser.parse_args()
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # of the jobs
    data, choices = HERE / "data", {}
    if args.report and not report.has_enough():
        sys.exit(f"{data} does not have {report.ENOUGH} seeds of each arm of README's table yet")
    if not args.report:
        major, minor = report.MAJOR, tuple(arm for arm in ARMS if arm not in report.MAJOR)
        waves = [(("base", *major), range(n)) for n in (1, 3, 5)]
        waves += [(minor[i : i + 2], range(3)) for i in range(0, len(minor), 2)]
        root, kinds = args.runs, tuple(KINDS)
        if args.quick:
            known = report.chosen(read_jsonl(data / "scores.jsonl"))
            choices = {arm: {"lr": RATES[0]} for arm in ARMS} | known
            data, root = args.runs / "quick", args.runs / "quick"
            waves, kinds = [(("base", *ARMS), range(1))], (report.TUNED,)
        data.mkdir(parents=True, exist_ok=True)
        write_teacher(data)
        with tqdm(total=0, desc="jobs so far known", smoothing=0) as bar:
            study = Study(root, data, bar, choices)
            asyncio.run(everything(study, waves, kinds))
    if args.quick:
        found = report.Report(data, choices)
        print(f"\n{report.TUNED} bases\n\n{found.arms_table(report.TUNED)}")
    elif report.has_enough():
        report.write_all()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except InputError as error:
        sys.exit(f"{error}. The same command goes on")
