"""Pictures: the curves of a training run, and evaluations of several models side by side."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean as mean

import matplotlib

from machinery.files import read_json, read_jsonl
from machinery.metrics import smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams["text.parse_math"] = False  # a $ in a label is a $
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def draw_curves(directory: Path) -> None:
    """curves.png of a run directory, from its metrics.jsonl. Nothing if there is no step yet."""
    rows = read_jsonl(directory / "metrics.jsonl")
    if not rows:
        return
    steps = [row["step"] for row in rows]
    sources = sorted({k for row in rows for k in row if k.startswith("reward/")})
    panels = {
        "reward of the rollouts": [(s, s.removeprefix("reward/")) for s in sources],
        "groups (rollouts only)": [
            ("groups/none", "none right"),
            ("groups/mixed", "some right"),
            ("groups/all", "all right"),
        ],
        "probability, entropy, imitation": [
            ("trace_prob", "mean π of a trace token"),
            ("trace_f", "mean f(π) of a trace token"),
            ("entropy", "entropy of rollout tokens (nats)"),
            ("trace_share", "share of traces in the gradient's weight"),
        ],
        "response length (tokens)": [("length", "rollouts"), ("trace_length", "traces")],
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels.items()):
        for key, label in curves:
            found = [(row["step"], row[key]) for row in rows if key in row]
            if found:
                (line,) = axis.plot(*zip(*found), alpha=0.25, linewidth=1)
                means, color = smooth([row.get(key) for row in rows]), line.get_color()
                form = "o" if len(rows) == 1 else "-"  # a line of one point shows nothing
                axis.plot(steps, means, form, label=label, color=color, linewidth=2)
        axis.set_title(title, fontsize=10, loc="left")
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(min(low, -0.03), max(high, 1.03))  # --reward may give more than 1
    axes[0, 1].set_ylim(-0.03, 1.03)
    config = read_json(directory / "config.json")
    run = f"{config['algo']} on {Path(config['model']).name}, seed {config['seed']}"
    figure.suptitle(f"{run} (thick: mean of 10 steps)", fontsize=11)
    half_written = directory / "curves.png.tmp"  # it may be looked at while the run goes on
    figure.savefig(half_written, dpi=130, format="png")
    half_written.replace(directory / "curves.png")
    plt.close(figure)


def draw_comparison(models: dict[str, dict[tuple, tuple]], file: Path) -> None:
    """models: name -> (benchmark, temperature, k) -> (scores, lengths). Means over benchmarks."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    longest = max(max(lengths) for found in models.values() for _, lengths in found.values())
    for name, evaluations in models.items():
        # the most samples, at the temperature that is nearest to the paper's
        shown = min((-k, abs(t - 0.6), t) for _, t, k in evaluations)[::2]
        curves, by_temperature = [], defaultdict(list)
        for (_, temperature, k), (scores, _) in evaluations.items():
            by_temperature[temperature].append(scores["avg"])
            if (-k, temperature) == shown:
                curves.append(scores["pass_at"])
        at_k = [mean(values) for values in zip(*curves)]
        marker, label = "o" if len(at_k) == 1 else None, f"{name}, T = {shown[1]:g}"
        axes[0].plot(range(1, len(at_k) + 1), at_k, label=label, marker=marker)
        averages = sorted((t, mean(values)) for t, values in by_temperature.items())
        axes[1].plot(*zip(*averages), marker="o", label=name)
        every = [n for _, lengths in evaluations.values() for n in lengths]
        bins = [i * (longest + 1) / 40 for i in range(41)]
        axes[2].hist(every, bins, label=name, histtype="step", density=True, linewidth=1.5)
    titles = "pass@k", "avg@k", "responses, all temperatures"
    for axis, title, label in zip(axes, titles, ("k", "temperature", "tokens")):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(label)
    for axis in axes[:2]:
        axis.set_ylim(-0.03, 1.03)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[2].set_yticks([])
    figure.savefig(file, dpi=130)
    plt.close(figure)
