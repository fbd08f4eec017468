"""Whatever is edited under an existing evaluation: no score of what was there before."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import Judge
from safetensors.torch import load_file, save_file

import eval as evaluation
from eval import load_rows
from machinery.processes import InputError, seed_of
from machinery.samplers import Sample
from machinery.toy import make_model, make_tokenizer
from verify import grade

SAMPLED: list[int] = []  # prompts of each call of the sampler


class Oracle:
    """Its responses are a function of all that they may depend on, and of nothing else."""

    def __init__(self, path, config, ends):
        names = "model.safetensors", "config.json", "generation_config.json"
        self.model = [hashlib.sha256(Path(path, name).read_bytes()).hexdigest() for name in names]
        self.tokenizer, self.end = make_tokenizer(), ends[0]

    def generate(self, prompts, n, *, seeds, temperature, max_tokens):
        SAMPLED.append(len(prompts))
        return [
            [self.sample(list(p), seed, j, n, temperature, max_tokens) for j in range(n)]
            for p, seed in zip(prompts, seeds)
        ]

    def sample(self, *what) -> Sample:
        digits = seed_of(self.model, *what)
        text = f"{digits // 4 % 10**6}\\boxed{{{digits % 4}}}"
        tokens = [*self.tokenizer.encode(text), self.end]
        return Sample(tokens, [0.0] * len(tokens))


class World:
    """A model, a benchmark file, flags: the state that an edit changes."""

    def __init__(self, root: Path, model: Path):
        self.root, self.model, self.bench = root, root / "model", root / "p.jsonl"
        shutil.copytree(model, self.model)
        (root / "t.jinja").write_text("{{ messages[-1]['content'] }}x")
        (root / "other").mkdir()
        asked = [("0", "1"), ("1", "2"), ("2", "3"), ("3", "0"), ("4", "1"), ("5" * 20, "1")]
        self.rows = [
            dict(
                data_source="ab"[i % 2], prompt=[dict(role="user", content=f"{q}+{q}=?")], answer=a
            )
            for i, (q, a) in enumerate(asked)
        ]
        self.flags = {"--model": self.model, "--bench": self.bench, "--samples": 4}
        self.save()

    def save(self, file: Path | None = None) -> None:
        (file or self.bench).write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def evaluate(self, out: str, monkeypatch) -> tuple[int, list, list]:
        """-> prompts sampled, the rows that were scored, scores.json."""
        flags = [str(x) for pair in self.flags.items() for x in pair]
        monkeypatch.setattr("sys.argv", ["eval.py", *flags, "--out", str(self.root / out)])
        SAMPLED.clear()
        evaluation.main()
        rows = sum(load_rows(self.root / out).values(), [])
        found = [{**row, "block": "", "of": 0} for row in rows]
        return sum(SAMPLED), found, json.loads((self.root / out / "scores.json").read_text())


# An edit gets the World; it returns how many prompts are sampled then, or words of the refusal.
def weights(change):
    """Of the same size, and the file's times are put back."""

    def edit(w: World) -> str:
        file = w.model / "model.safetensors"
        times, tensors = file.stat(), load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        assert file.stat().st_size == times.st_size
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        return "other contents in model.safetensors"

    return edit


def all_zero(tensors):
    for x in tensors.values():
        x.zero_()


def one_number(tensors):
    next(iter(tensors.values())).view(-1)[0] += 1


def json_file(name, **values):
    def edit(w: World) -> str:
        old = json.loads((w.model / name).read_text())
        (w.model / name).write_text(json.dumps(old | values))
        return f"other contents in {name}"

    return edit


def rows(change, sampled: int):
    def edit(w: World) -> int:
        change(w.rows)
        w.save()
        return sampled

    return edit


def flags(expected, **values):
    def edit(w: World):
        w.flags |= {f"--{name}": value for name, value in values.items()}
        return expected

    return edit


def own_template(w: World) -> str:
    (w.model / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}y")
    return "chat_template.jinja"


def retrained(w: World) -> str:
    make_model(make_tokenizer(), seed=1).save_pretrained(w.model)
    return "other contents in model.safetensors"


def spelt_otherwise(w: World) -> int:
    (w.root / "link").symlink_to(w.model)
    w.flags |= {"--model": f"{w.root}/link/", "--bench": f"{w.root}/other/../p.jsonl"}
    return 0


def copied(w: World) -> int:
    w.flags["--model"] = shutil.copytree(w.model, w.root / "elsewhere")
    return 0


def another_file(w: World) -> int:
    w.flags["--bench"] = w.root / "other" / "p.jsonl"
    for row in w.rows:
        row["answer"] = "3"
    w.save(w.flags["--bench"])
    return 6


def both_files(w: World) -> int:
    another_file(w)
    w.flags["--bench"] = f"{w.bench},{w.root}/other/p.jsonl"
    return 6


def half_a_row(w: World) -> int:
    [file] = (w.root / "out").glob("*-rank0.jsonl")
    file.write_bytes(file.read_bytes()[:-10])
    return 6  # all were in one block


def a_broken_row(w: World) -> str:
    [file] = (w.root / "out").glob("*-rank0.jsonl")
    file.write_bytes(file.read_bytes().replace(b"{", b"", 1))
    return "rank0.jsonl, line 1: not a row"


def while_it_loads(w: World) -> str:
    w.loading = lambda: retrained(w)
    shutil.rmtree(w.root / "out")
    return "changed while they were read"


def a_run(w: World) -> str:
    (w.root / "out" / "config.json").write_text('{"algo": "luffy", "template": "own", "seed": 0}')
    return "not an evaluation's directory"


def another_verifier(w: World) -> int:
    w.verdict = lambda response, answer: 1 - grade(response, answer)
    return 0


def earlier_version(w: World) -> str:
    (w.root / "out" / "config.json").write_text('{"model": "m", "template": "own", "seed": 0}')
    return "earlier version"


EDITS = {
    "nothing": lambda w: 0,
    "all weights are zero": weights(all_zero),
    "one number of one tensor": weights(one_number),
    "another model at the same path": retrained,
    "config.json": json_file("config.json", rope_theta=7.0),
    "the tokens that end": json_file("generation_config.json", eos_token_id=[3]),
    "tokenizer_config.json": json_file("tokenizer_config.json", bos_token="<eos>"),
    "the model's own template": own_template,
    "--template": lambda w: flags("template was", template=w.root / "t.jinja")(w),
    "a prompt": rows(lambda r: r[2]["prompt"][0].update(content="7+7=?"), 1),
    "a gold": rows(lambda r: r[2].update(answer="0"), 0),
    "a gold and a source": rows(lambda r: r[2].update(answer="0", data_source="c"), 0),
    "the order": rows(lambda r: random.Random(1).shuffle(r), 0),
    "a problem more, in front": rows(lambda r: r.insert(0, r[0] | dict(prompt="8+8=?")), 1),
    "a problem again": rows(lambda r: r.insert(3, dict(r[1])), 1),
    "the same prompt, another gold": rows(lambda r: r.append(r[1] | dict(answer="0")), 1),
    "a problem less": rows(lambda r: r.pop(0), 0),
    "all problems": rows(lambda r: [x.update(prompt=f"9+{i}=?") for i, x in enumerate(r)], 6),
    "another file of the same name": another_file,
    "both files of that name": both_files,
    "--seed": flags("seed was 0, now 1", seed=1),
    "--temperature": flags(6, temperature=0.6000001),  # the same in six digits
    "--samples": flags(6, samples=3),
    "--max_response_tokens": flags("max_response_tokens was", max_response_tokens=20),
    "--max_prompt_tokens": flags(0, max_prompt_tokens=40),
    "--limit": flags(0, limit=2),
    "paths spelt otherwise": spelt_otherwise,
    "the same model elsewhere": copied,
    "the verifier": another_verifier,
    "half a row at the end": half_a_row,
    "a broken row": a_broken_row,
    "the weights, while they are loaded": while_it_loads,
    "made by an earlier version": earlier_version,
    "a run of training": a_run,
}


QUICK = "one number of one tensor", "a prompt", "a gold", "the order", "both files of that name"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in EDITS]
)
def test_no_score_is_stale(name, tiny_model, tmp_path, monkeypatch):
    """What comes of the old directory after an edit is what a new one gives, or a refusal."""
    world = World(tmp_path, tiny_model)
    world.verdict = grade
    judge = Judge(lambda jobs: [world.verdict(*job) for job in jobs])
    monkeypatch.setattr(evaluation, "Grader", lambda workers: judge)
    monkeypatch.setattr(evaluation, "verifier", lambda: [world.verdict is grade])
    monkeypatch.setattr(evaluation, "init_processes", lambda *_: None)
    world.loading = lambda: None
    monkeypatch.setattr(evaluation, "TorchSampler", lambda *a: (world.loading(), Oracle(*a))[1])
    sampled, _, scores = world.evaluate("out", monkeypatch)
    assert sampled == 6 and 0 < scores[0]["avg"] < 1

    expected = EDITS[name](world)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            world.evaluate("out", monkeypatch)
        return
    sampled, rows, scores = world.evaluate("out", monkeypatch)
    assert sampled == expected
    _, new_rows, new_scores = world.evaluate("new", monkeypatch)
    assert scores == new_scores
    assert all(row in rows for row in new_rows)  # it may hold those of an earlier k, too
