"""What each row of ALGORITHMS does with a token: README's table and docs/methods.png.

    python results/methods.py

w(π) is ∂ objective / ∂ log π of a trace token with advantage 1, by automatic differentiation of the
objective that trains. The formulas in the table are checked against it in tests/test_readme.py.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from luffy import ALGORITHMS, LOG_PI_PHI, SHAPINGS, Config, at_step  # noqa: E402
from luffy import mixed_policy_objective  # noqa: E402
from machinery import rivals  # noqa: E402
from machinery.printing import print_what_can_be  # noqa: E402

# Shaping -> w(π) in words, and as a function of π and γ, with π_old = π (a step's first update)
W: dict[str, tuple[str, Callable]] = {
    "log": ("1", lambda p, g: p / p),
    "none": ("π", lambda p, g: p),
    "luffy": ("γπ/(π+γ)²", lambda p, g: g * p / (p + g) ** 2),
    "trsft": ("min(1, π/γ)", lambda p, g: (p / g).clamp(max=1)),
    "phi": ("π(1-π)", lambda p, g: p * (1 - p)),
    "rl_plus": ("4π√(1-π)/(3π_old+1)", lambda p, g: 4 * p * (1 - p) ** 0.5 / (3 * p + 1)),
    "old": ("π/π_old", lambda p, g: p / p),
}
ROUTES = {
    "all": "all",
    "hpt": "trace if no rollout is right, else rollouts",
    "hpt_2": "trace if at most 2 are right, else rollouts",
}
ROLLOUTS = {  # objective -> what a rollout's token counts, where it is not the ratio with a clip
    "cispo": "sg(min(x, {cap:g})) A log π",
    "gspo": "x A, x of the whole response, clip {low:g}/{high:g}",
    "gmpo": "x A, x of the whole response, log x clipped at {low:g}",
    "srft": "A log π, times .1e^H if right",
    "srft_plus": "A log π, times .1e^H if right",
}
ADVANTAGES = {  # advantages of rollouts that are not the group's
    "whitened": "r - mean, whitened over the batch's tokens",
    "plus_minus": "1 if right, -1 if wrong",
}
# Row -> the method's name, and its published average of the six benchmarks (Qwen2.5-Math-7B)
NAMES = {
    "luffy": ("**LUFFY**", "50.1"),
    "mixed_shaped": ("Mixed-Policy + shaping", "47.8"),
    "mixed": ("Mixed-Policy GRPO (Eq. 5)", "44.4"),
    "on_policy": ("On-Policy RL (Dr. GRPO); RLOO", "45.5"),
    "on_policy_noclip": ("on-policy, no clip", "44.9"),
    "on_policy_shaped": ("on-policy + shaping: f(π)/f(π_old)", "42.0"),
    "grpo": ("GRPO (token mean, no KL)", "-"),
    "rl_sft": ("RL w/ SFT loss", "40.1"),
    "sft": ("SFT on the traces", "44.1"),
    "sft_2604": ("SFT, corrected (2604.23747)", "52.2"),
    "rl_2604": ("RL from its checkpoint (2604.23747)", "57.0"),
    "dft": ("DFT (2508.05629)", "-"),
    "trsft": ("TrSFT, TRAPO's weight", "-"),
    "sft_shaped": ("SFT with LUFFY's weight", "-"),
    "hpt": ("HPT (2509.04419)", "52.7"),
    "hpt_2": ("HPT for Llama", "-"),
    "chord_phi": ("CHORD-φ (2508.11408)", "-"),
    "chord_mu": ("CHORD-μ", "-"),
    "rl_plus": ("RL-PLUS (2508.00222)", "53.4"),
    "srft": ("SRFT (2506.19767)", "53.2"),
    "srft_plus": ("SRFT with e^+H", "-"),
    "dapo": ("DAPO (2503.14476), no refill", "-"),
    "cispo": ("CISPO (2506.13585)", "-"),
    "gspo": ("GSPO (2507.18071)", "-"),
    "gmpo": ("GMPO (2507.20673)", "-"),
    "reinforce_pp": ("REINFORCE++ baseline (2501.03262)", "-"),
    "prefix_rft": ("Prefix-RFT (2507.01679)", "51.8"),
    "uft": ("UFT (2505.16984), without its KL", "-"),
}


# ------------------------------------------------------------------ the table
def table() -> str:
    """One line for each row of ALGORITHMS, from its fields."""
    head = "`--algo`", "method", "group", "who learns", "A of a trace", "w of a trace token"
    head += "A of a rollout", "objective of its token", "Z of rollouts", "Z of traces", "published"
    lines = [head, ["---"] * len(head)]
    lines += [[f"`{algo}`", NAMES[algo][0], *cells(algo), NAMES[algo][1]] for algo in NAMES]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(algo: str) -> list[str]:
    cfg = Config(**ALGORITHMS[algo])
    has_trace, is_sft = cfg.traces or cfg.continuations, SHAPINGS[cfg.shaping].is_sft
    plain = cfg.rollouts - cfg.continuations
    group = f"{plain}+{cfg.traces}" if plain or cfg.traces else ""
    group += ", " * bool(group and cfg.continuations)
    group += f"{cfg.continuations} from a prefix" if cfg.continuations else ""
    of_group = f"r - mean{', / std' if cfg.normalize_std else ''}"
    given = cfg.trace_advantage
    z = "tokens" if cfg.token_mean else "M x own length" if cfg.sequence_mean else "M x L"
    z += factor(cfg, "rl_coef")
    sft_z = f"their tokens{factor(cfg, 'sft_coef')}"
    of_trace = sft_z if is_sft else z if cfg.rollouts else "their tokens"
    a_of_trace = f"{given:g}" if given is not None else of_group
    if cfg.objective in rivals.WITH_SFT:
        a_of_trace, of_trace = f"1 (SFT), {a_of_trace}", f"{sft_z} (SFT), {of_trace}"
    return [
        group,
        ROUTES[cfg.route],
        a_of_trace if has_trace else "-",
        weight(cfg) if has_trace else "-",
        ADVANTAGES.get(cfg.advantage, of_group) if cfg.rollouts else "-",
        rollout_rule(cfg) if cfg.rollouts else "-",
        z if cfg.rollouts else "-",
        of_trace if has_trace else "-",
    ]


def factor(cfg: Config, name: str) -> str:
    """A coefficient that is not 1, from the first step to the last."""
    first, last = (f"{getattr(at_step(cfg, step), name):.2g}" for step in (0, cfg.steps - 1))
    return f"; c = {first}" + f" to {last}" * (first != last) if {first, last} != {"1"} else ""


def weight(cfg: Config) -> str:
    words = W[cfg.shaping][0]
    if cfg.objective.startswith("srft"):
        words = f"½e^{'+' if cfg.objective.endswith('plus') else '-'}H (SFT), {words}"
    if cfg.prefix_learns < 1:
        words += f", the {cfg.prefix_learns:.0%} most uncertain"
    return words


def rollout_rule(cfg: Config) -> str:
    if cfg.objective in ROLLOUTS:
        low, high = rivals.epsilons(cfg.clip, cfg.clip_high)
        return ROLLOUTS[cfg.objective].format(low=low, high=high, cap=1 + high)
    ratio = "f(π)/f(π_old) A" if cfg.shape_rollouts else "x A"
    if cfg.clip is None:
        return ratio
    both = f"{cfg.clip:g}" if cfg.clip_high is None else f"{cfg.clip:g}/{cfg.clip_high:g}"
    return f"{ratio}, clip {both}{', dual 3' if 'dual' in cfg.objective else ''}"


# ------------------------------------------------------------------ the picture
def w_of(shaping: str, pi: torch.Tensor, gamma: float = 0.1) -> torch.Tensor:
    """w(π) of a trace token by the objective itself, where π_old = π."""
    logp = pi.log().requires_grad_()
    log_pi_phi = SHAPINGS[shaping].log_pi_phi
    behavior = log_pi_phi(logp.detach()) if log_pi_phi else torch.full_like(logp, LOG_PI_PHI)
    ones = torch.ones_like(logp)
    how: Any = dict(shaping=shaping, gamma=gamma)
    mixed_policy_objective(logp, behavior, ones, ones.bool(), **how).sum().backward()
    return logp.grad


def draw(file: Path) -> None:
    curves = {
        "luffy": "LUFFY:  γπ/(π+γ)²",
        "none": "no shaping; DFT:  π",
        "log": "SFT, HPT, CHORD-μ, UFT; Prefix-RFT's 20 %:  1",
        "trsft": "TrSFT, TRAPO:  min(1, π/γ)",
        "phi": "CHORD-φ:  π(1-π)",
        "rl_plus": "RL-PLUS:  4π√(1-π)/(3π+1)",
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    grids = torch.linspace(1e-4, 1 - 1e-6, 2000), torch.logspace(-4, -1e-6, 2000)
    colours = ["#c0392b", "#2471a3", "#222222", "#1e8449", "#b9770e", "#7d3c98"]
    styles = ["-", "--", "-.", (0, (5, 1)), ":", (0, (3, 1, 1, 1))]
    for axis, pi in zip(axes, (grid.double() for grid in grids)):
        for (shaping, label), colour, style in zip(curves.items(), colours, styles):
            width = 2.8 if shaping == "luffy" else 1.8
            how = dict(color=colour, label=label, linewidth=width, linestyle=style)
            axis.plot(pi, w_of(shaping, pi), **how)
        axis.set_xlabel("π, the policy's probability of the trace's token")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("w(π): what a trace token's ∇log π is multiplied by", fontsize=10, loc="left")
    axes[1].set_title(
        "the same on logarithmic axes: right but unlikely tokens", fontsize=10, loc="left"
    )
    axes[0].set_ylim(-0.02, 1.05)
    axes[1].set(xscale="log", yscale="log", ylim=(5e-5, 1.6))
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, fontsize=9, loc="outside lower center", ncol=3)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def fill(readme: str) -> str:
    block = f"<!-- methods -->\n\n{table()}\n<!-- end methods -->"
    return re.sub(r"<!-- methods -->.*<!-- end methods -->", lambda _: block, readme, flags=re.S)


if __name__ == "__main__":
    print_what_can_be()
    if missing := set(ALGORITHMS) - set(NAMES):
        print(f"rows without a name in NAMES are left out: {', '.join(sorted(missing))}")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text("utf-8")), "utf-8")
    draw(ROOT / "docs" / "methods.png")
    print(table())
