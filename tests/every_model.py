"""A step of luffy.py from its command line on tiny models, held against transformers alone.

    PYTHONPATH=. python tests/every_model.py [NAME ...]  # all architectures, or these: a line each

"right": log-probs of rollouts and traces, and the gradient, are those of a plain model that has
transformers' eager attention and one unpadded sequence at a time; so are the sampler's log-probs.
"""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny_models import ARCHITECTURES, make_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import luffy
from machinery.processes import InputError

SMALL = (
    "--data toy --eval_data none --steps 1 --updates_per_step 1 --problems_per_step 2 --rollouts 3 "
    "--max_prompt_tokens 40 --max_response_tokens 12 --max_trace_tokens 90 --entropy_coef 0"
)
PATIENCE = 1200  # seconds for a model; on a busy machine some take minutes


def plain(path: Path) -> PreTrainedModel:
    how: dict[str, Any] = dict(attn_implementation="eager", dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(path, **how).eval()


def plain_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + response])
    logp = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1].log_softmax(-1)
    return logp.gather(1, ids[0, -len(response) :, None])[:, 0]


def worst(path: Path, trajectories: list, gradients: dict) -> dict[str, float]:
    """How far the policy is from the plain model."""
    model, off, kl = plain(path), 0.0, 0.0
    for t in trajectories:
        logps = plain_logps(model, list(t.problem.prompt_ids), list(t.response))
        off = max(off, (t.logp - logps.detach()).abs().max().item())
        if t.logp_sampler:
            kl = max(kl, (torch.tensor(t.logp_sampler) - logps.detach()).abs().max().item())
        (-(t.inv_z * t.slope * logps).sum()).backward()
    pairs = [
        (p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None
    ]
    length = sum(own.double().square().sum() for own, _ in pairs).sqrt()
    apart = sum((own - found).double().square().sum() for own, found in pairs).sqrt()
    return {"policy": off, "sampler": kl, "gradient": (apart / length).item()}


def train(path: Path, out: Path) -> dict[str, float]:
    found, original = {}, luffy.update

    def update(policy, optimizer, trajectories, cfg):
        gradients, step = {}, optimizer.step

        def keep(max_norm):
            grads = {n: p.grad for n, p in policy.module.model.named_parameters()}
            gradients.update({n: g.clone() for n, g in grads.items() if g is not None})
            return step(max_norm)

        optimizer.step = keep
        metrics = original(policy, optimizer, trajectories, cfg)
        found.update(worst(path, trajectories, gradients))
        return metrics

    sys.argv = ["luffy.py", "--model", str(path), "--out", str(out), *SMALL.split()]
    luffy.main(update=update)
    return found


def attempt(name: str, directory: str) -> None:
    """Print what became of it, in one line; traceback of what is neither right nor refused."""
    said = io.StringIO()
    try:
        path = make_tiny(name, Path(directory, name))
        with contextlib.redirect_stdout(said):
            found = train(path, Path(directory, f"{name}-run"))
    except InputError as error:
        one_line = "\n" not in str(error)
        print(name, "refused" if one_line else "WRONG", str(error).replace("\n", "\\n"), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(name, "RAISED", f"{type(error).__name__}: {error}".split("\n")[0], flush=True)
    else:
        right = found["policy"] < 1e-3 and found["sampler"] < 1e-3 and found["gradient"] < 1e-2
        ways = [line for line in said.getvalue().splitlines() if "sampler  " in line[:12]][1:]
        alone = "one trajectory at a time" in said.getvalue()
        way = ("alone" if alone else "packed") + ("" if not ways else ", no cache")
        figures = " ".join(f"{k} {v:.1e}" for k, v in found.items())
        print(name, "right" if right else "WRONG", f"({way}) {figures}", flush=True)


def main() -> None:
    fork = multiprocessing.get_context("fork")  # a process each, and torch is imported once
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[1:] or ARCHITECTURES:
            process = fork.Process(target=attempt, args=(name, directory))
            process.start()
            process.join(PATIENCE)
            if process.exitcode != 0:
                process.kill()
                print(name, "DIED" if process.exitcode else "TOO SLOW", flush=True)


if __name__ == "__main__":
    main()
