"""How a step's cost grows: with processes, group size, length, vocabulary; and what none asked for.

    python benchmarks/scaling.py               # CPU, half an hour; prints the tables of its README
    python benchmarks/scaling.py --computed    # seconds: those of GPUs, from bytes and bandwidth

The step is that of benchmarks/compare_trl.py's tiny shape, float32, one thread a process; each
table changes one number. Processes: the same step by one, two and four, in turns. Overhead: of the
toy's real run, what a step takes beyond its phases sample, score, update and sync; evaluation and
checkpoints are not in it. Computed: tokens with and without a group's prompt in common, and what
ranks send each other in a step of the paper's run, and how long that takes.
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time

from tiny import VOCABULARY, Ours, in_process, luffy, machine, save, show, show_head, spread
from tqdm import tqdm

from machinery import plan
from machinery.batches import Trajectory
from machinery.model import parameter_sizes, shape_of

RANKS = 1, 2, 4
GROWTH = {  # what grows -> its values; elsewhere 8, 128 and 512
    "samples of a prompt": ("rollouts", (4, 8, 16)),
    "longest response": ("max_response_tokens", (64, 128, 256)),
    "vocabulary": ("vocabulary", (512, 4096, 32768)),
}
PAPER = "Qwen/Qwen2.5-Math-7B"
PROMPT = 230  # tokens of the paper's prompts, with the system text (assumed)
BUCKET = 25 * 2**20  # bytes of DDP's buckets
HOP = 10e-6  # seconds to the next GPU of a ring (assumed)
# Bytes a second that each GPU of a ring sends and receives (assumed), by the slowest link on it:
NVLINK = 200e9  # of an A100's 300
NETWORKS = {"400 Gb/s a GPU": 200e9, "400 Gb/s a node": 40e9}  # NVLink's, as 8 cards carry more


# ------------------------------------------------------------------ measured
def measure(changes: dict, steps: int) -> dict:
    """Medians of this many steps after one to warm up, in this process or these processes."""
    luffy.init_processes()
    if luffy.world_size() == 1:
        Ours.clock = staticmethod(time.process_time) if changes.pop("cpu", False) else Ours.clock
    program = Ours(**changes)
    rows = [program.step(number) for number in range(steps + 1)][1:]
    keys = "sample", "score", "update", "step", "cpu", "tokens"
    return {key: statistics.median(row[key] for row in rows) for key in keys}


def overhead(steps: int) -> dict:
    """Of a run of luffy.py on the toy: seconds between the ends of steps, and in the phases."""
    ends, phases = [], []

    class Clocked(luffy.Run):
        def log_step(self, *args):
            phases.append(sum(self.seconds.values()))
            super().log_step(*args)
            ends.append(time.perf_counter())

    luffy.Run = Clocked
    with tempfile.TemporaryDirectory() as directory:
        given = f"--steps {steps} --save_every 100000 --eval_data= --out {directory}/run"
        cfg = luffy.parse_args(given.split())
        luffy.init_processes()
        luffy.train(cfg, luffy.find(cfg.model))
    walls = [b - a for a, b in zip(ends, ends[1:])]
    return {
        "step": statistics.median(walls),
        "overhead": statistics.median(1 - p / w for p, w in zip(phases[1:], walls)),
    }


def run(steps: int, ranks: int = 1, vocabulary: int = VOCABULARY, **changes) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        changes["model"] = save(directory, vocabulary=vocabulary)
        return in_process(__file__, "--one", json.dumps(changes), "--steps", steps, ranks=ranks)


def show_processes(rounds: int, steps: int) -> None:
    print(f"\n{machine()}; {rounds} rounds of {steps} steps, median (lowest to highest)\n")
    more = [f"{what}{n}" for n in RANKS[1:] for what in ("speed-up by ", "CPU seconds of all, ")]
    show_head("prompts", "", "1 process, s", *more)
    for prompts in (16, 32):
        turns = [
            {n: run(steps, problems_per_step=prompts, ranks=n) for n in RANKS}
            for _ in tqdm(range(rounds), "processes")
        ]
        for phase in ("sample", "update", "step"):
            cells = [spread([turn[1][phase] for turn in turns])]
            for n in RANKS[1:]:
                cpu = [turn[n]["cpu"] / turn[1]["cpu"] for turn in turns]
                cells += [
                    spread([turn[1][phase] / turn[n][phase] for turn in turns]),
                    spread(cpu) + " x" if phase == "step" else "",
                ]
            show(prompts, phase, *cells)


def show_growth(steps: int) -> None:
    print(f"\nMedians of {steps} steps of one process, CPU seconds\n")
    show_head("", "", "mean tokens", "sample", "update", "step", "sampled tokens a second")
    for what, (field, values) in GROWTH.items():
        for value in tqdm(values, what):
            row = run(steps, cpu=True, **{field: value})
            mean = row["tokens"] / 16 / (value if field == "rollouts" else 8)
            seconds = [f"{row[phase]:.2f}" for phase in ("sample", "update", "step")]
            rate = f"{row['tokens'] / row['step']:,.0f}"
            show(what, f"{value:,}", f"{mean:.0f}", *seconds, rate)


def show_overhead(rounds: int) -> None:
    rows = [in_process(__file__, "--one", "{}") for _ in tqdm(range(rounds), "overhead")]
    print(
        f"\nOverhead of the toy's run, of a step of {spread([r['step'] for r in rows])} s: "
        f"{spread([100 * r['overhead'] for r in rows])} %"
    )


# ------------------------------------------------------------------ computed
def show_shared_prompts() -> None:
    """A group of seven rollouts and a trace, in the layers of the paper's model."""
    config = shape_of(PAPER)
    head = config.vocab_size * config.hidden_size
    layers = sum(parameter_sizes(config)) - 2 * head
    width = config.hidden_size * config.num_hidden_layers

    def flops(prompt: int, responses: list[int], copies: int) -> float:
        """Forward, of layers, the head and the attention."""
        pairs = copies * prompt**2 / 2 + sum(n * prompt + n * n / 2 for n in responses)
        tokens = sum(responses)
        return 2 * layers * (copies * prompt + tokens) + 2 * head * tokens + 4 * width * pairs

    print("\nA group of 7 rollouts and a trace; FLOP of the paper's 7B, computed\n")
    show_head(
        *("prompt", "rollout", "trace", "tokens, a prompt each", "prompt once", "ratio"),
        *("FLOP, a prompt each / prompt once",),
    )
    trace = plan.MEAN_TOKENS["trace"]
    for prompt, rollout in ((PROMPT, 500), (PROMPT, 1000), (PROMPT, 2200), (1024, 2200)):
        responses = [rollout] * 7 + [trace]
        each, once = (copies * prompt + sum(responses) for copies in (8, 1))
        ratio = flops(prompt, responses, 8) / flops(prompt, responses, 1)
        sizes = [f"{n:,}" for n in (prompt, rollout, trace, each, once)]
        show(*sizes, f"{each / once:.2f}", f"{ratio:.2f}")


def pickled_step() -> tuple[int, float]:
    """Bytes of a step's trajectories as `deal` gathers them, and seconds to pickle and unpickle."""
    cfg, mean = luffy.Config(), plan.MEAN_TOKENS

    def tokens(n: int) -> list[int]:
        return list(range(10_000, 10_000 + n))

    def rollout() -> Trajectory:
        logps = [-i / 7 for i in range(mean["rollout"])]
        return Trajectory(0, None, tokens(mean["rollout"]), logp_sampler=logps)

    trace = Trajectory(0, None, tokens(mean["trace"]), off_policy=True)
    groups = [
        [rollout() for _ in range(cfg.rollouts)] + [trace] for _ in range(cfg.problems_per_step)
    ]
    start = time.process_time()
    sent = [pickle.dumps(group) for group in groups]
    for group in sent:
        pickle.loads(group)
    return sum(map(len, sent)), time.process_time() - start


def show_communication() -> None:
    """Of the paper's run, by rings: what each GPU sends in a step, and how long that takes."""
    cfg = luffy.Config()
    sizes = parameter_sizes(shape_of(PAPER))
    weights, updates = 2 * sum(sizes), cfg.updates_per_step  # bytes, in bfloat16
    gathered, seconds = pickled_step()
    hops = weights / BUCKET * HOP, len(sizes) * HOP  # of all buckets, of all tensors
    print(
        f"\nComputed: a step of the paper's run, {updates} updates of {sum(sizes) / 1e9:.2f} "
        f"billion parameters in bfloat16 ({weights / 1e9:.1f} GB); rings, {HOP * 1e6:.0f} µs a hop;"
        f" trajectories {gathered / 1e6:.0f} MB, {seconds:.1f} s to pickle and unpickle them all\n"
    )
    show_head(
        *("GPUs", "between nodes", "GB/s of a GPU", "gradients, s", "parameters, s"),
        *("trajectories, s", "in all, s"),
    )
    machines = [(8, "-", NVLINK)]
    machines += [(n, name, rate) for n in (16, 64) for name, rate in NETWORKS.items()]
    for n, name, rate in machines:
        ring = (n - 1) / n
        gradients = updates * (2 * ring * weights / rate + 2 * (n - 1) * hops[0])
        parameters = updates * (weights / rate + (n - 1) * hops[1])  # the owner's, to all others
        trajectories = ring * gathered / rate + seconds
        parts = gradients, parameters, trajectories
        cells = [f"{x:.2f}" for x in (*parts, sum(parts))]
        show(n, name, f"{rate / 1e9:.0f}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured in a process")
    parser.add_argument("--computed", action="store_true", help="only what is not measured")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        changes = json.loads(args.one)
        out = measure(changes, args.steps) if changes else overhead(50)
        if luffy.rank() == 0:
            print("\n" + json.dumps(out))
        return
    if not args.computed:
        show_processes(args.rounds, args.steps)
        show_growth(args.steps)
        show_overhead(args.rounds)
    show_shared_prompts()
    show_communication()


if __name__ == "__main__":
    luffy.launch(main)
