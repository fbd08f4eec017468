"""An evaluation's directory, which stays true when a model, a file or a flag changes.

config.json                    what was asked for, and the sha256 of each of the model's files
BENCHMARK-tT-kK-asked.json     the problems that were asked last
BENCHMARK-tT-kK-rankN.jsonl    a row for each response, in blocks
scores.json                    a row for each benchmark and temperature

A row says by digests what it is of. `key`: the model, the prompt's tokens and how it was sampled;
`graded`: the gold and the verifier. Where one of these is another one now, the row does not count:
the response is sampled anew, or graded anew. So no edit and no path can make it another's.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

from machinery.checkpoints import CHECKSUMS
from machinery.files import append, lock, read_json, read_jsonl, to_jsonl, write
from machinery.model import reading
from machinery.processes import InputError, barrier, by_rank_0, gather, progress, rank, say
from machinery.processes import seed_of, world_size
from machinery.scores import Grader, Problem, graded, has_verdict

READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # what from_pretrained may read
PICKLES = (".bin",)  # of older models
FIELDS: dict[str, Any] = dict(key=str, graded=str, block=str, of=int, sample=int, tokens=int)
FIELDS |= dict(truncated=bool, response=str)  # of a row
FIELDS |= dict.fromkeys(("reward", "lenient"), int | float | None)
ASKED = "question", "key", "graded", "source"  # of a problem
Rows = dict[tuple[str, float, int], list[dict]]  # (benchmark, temperature, k) -> its responses


def digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


# ------------------------------------------------------------------ whose they are
def snapshot(path: str) -> str:
    """The directory of a model: for a name on the hub, where its files are, downloaded."""
    if os.path.isdir(path):
        return path
    from huggingface_hub import snapshot_download

    with reading(path):
        found = snapshot_download(path, **patterns(READ))
        if not any(Path(found).glob("*.safetensors")):
            snapshot_download(path, **patterns(PICKLES))
    return str(found)


def patterns(ends: tuple[str, ...]) -> dict[str, Any]:
    some = [f"*{end}" for end in ends]
    return dict(allow_patterns=some, ignore_patterns=["*/*", "consolidated*"])


def files_of(directory: str | Path) -> list[Path]:
    """All that from_pretrained may read; the largest first. None of a name on the hub."""
    found = {file for file in Path(directory).glob("*") if file.suffix in READ + PICKLES}
    for index in Path(directory).glob("*.index.json"):  # may name files in directories below
        parts = read_json(index).get("weight_map")
        parts = parts.values() if isinstance(parts, dict) else []
        found |= {Path(directory, str(part)) for part in parts}
    found = {file for file in found if file.is_file() and file.name != CHECKSUMS}
    return sorted(found, key=lambda file: (-file.stat().st_size, str(file)))


def stamps(directory: str | Path) -> dict[str, tuple[int, int, int]]:
    """What tells that a file was written again, while one looks."""
    found = {os.path.relpath(file, directory): file.stat() for file in files_of(directory)}
    return {name: (s.st_size, s.st_mtime_ns, s.st_ino) for name, s in found.items()}


def hashes(directory: str | Path) -> dict[str, str]:
    """File -> sha256 of its bytes. By all ranks, which share the reading."""
    files = files_of(directory)
    mine, sums = files[rank() :: world_size()], {}
    with progress("hash", len(files)) as bar, ThreadPoolExecutor(4) as threads:
        for file, found in zip(mine, threads.map(sha256, mine)):
            sums[os.path.relpath(file, directory)] = found
            bar.update(world_size())
    return dict(sorted(item for some in gather(sums) for item in some.items()))


def sha256(file: Path) -> str:
    with file.open("rb") as opened:  # lets other threads work
        return hashlib.file_digest(opened, "sha256").hexdigest()


def take(out: Path, config: dict[str, Any]) -> None:
    """Make the directory this evaluation's, by all ranks. InputError if it is another's.

    config: all of it has to be the same if the directory is to go on, but `model`, a name; `of`
    says what the model is.
    """

    def by_one() -> None:
        check(out, config)
        lock(out)
        check(out, config)  # another one may just have ended
        write(out / "config.json", json.dumps(config, indent=1))

    by_rank_0(by_one)


def check(out: Path, config: dict[str, Any]) -> None:
    file = out / "config.json"
    if not file.is_file():
        if (out / "scores.json").exists():  # it would be overwritten
            raise InputError(f"--out {out} has a scores.json of something else; name another one")
        return
    old = read_json(file)
    if "seed" not in old or "algo" in old:  # of a model, of a run
        raise InputError(f"--out {out} is not an evaluation's directory; name another one")
    if not isinstance(old.get("of"), dict):
        raise InputError(
            f"--out {out} holds an evaluation by an earlier version of this program, which did not "
            "note whose weights it sampled from. Name another --out, or remove it"
        )
    differ = [
        f"{name} was {old.get(name)!r}, now {config[name]!r}"
        for name in config
        if name not in ("model", "of") and old.get(name) != config[name]
    ]
    was, now = old["of"], config["of"]
    parts = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if parts and "url" in now:
        differ += [f"{name} was {was.get(name)!r}, now {now.get(name)!r}" for name in parts]
    elif parts:
        other = f"{', '.join(parts[:4])}{', ...' * (len(parts) > 4)}"
        differ.append(f"the model has other contents in {other}")
    if differ:
        raise InputError(
            f"--out {out} holds another evaluation: {'; '.join(differ)}. Name another --out, or "
            "remove that directory"
        )


# ------------------------------------------------------------------ which of them count
def numbered(found: Iterable[Any]) -> list[str]:
    """A digest of each; for the n-th of the same, of n, too."""
    seen: Counter[str] = Counter()
    digests = []
    for facts in found:
        same = digest(facts)
        seen[same] += 1
        digests.append(digest(same, seen[same]))
    return digests


def file_name(benchmark: str) -> str:
    """A part of file names for each benchmark: two files, and only they, have different ones."""
    if re.fullmatch(r"[\w/-]+", benchmark, re.ASCII) and not os.path.isfile(benchmark):
        return benchmark.replace("/", ".")
    where = os.path.realpath(benchmark) if os.path.isfile(benchmark) else benchmark
    readable = re.sub(r"[^\w.-]+", "-", Path(benchmark).name, flags=re.ASCII).strip(".-")
    return f"{readable[:60]}-{digest(where)[:8]}"


class Responses:
    """Those of a benchmark at a temperature, k to each of some of its problems."""

    def __init__(
        self,
        out: Path,
        benchmark: str,
        problems: list[Problem],
        numbers: Sequence[int],
        questions: list[str],
        *,
        k: int,
        temperature: float,
        room: Sequence[int],
        seed: int,
        model: Any,
        verifier: Any,
    ):
        """numbers: of the problems that are asked. For each problem: questions, what is the same
        for all models that are asked it; room, tokens of a response. For JSON: model, verifier,
        facts that tell them from others."""
        self.out, self.problems, self.numbers, self.k = out, problems, list(numbers), k
        self.benchmark, self.temperature, self.questions = benchmark, temperature, questions
        self.stem = f"{file_name(benchmark)}-t{repr(temperature).removesuffix('.0')}-k{k}"
        prompts = numbered(list(p.prompt_ids) or p.prompt for p in problems)
        self.seeds = [seed_of("evaluation", seed, prompt) for prompt in prompts]
        how = model, temperature, k, seed
        self.keys = [digest(how, prompt, n) for prompt, n in zip(prompts, room)]
        self.graded = [digest(p.answer, verifier) for p in problems]
        self.number = {self.keys[i]: i for i in self.numbers}
        self.stale: list[Path] = []  # files whose responses have other verdicts

    def files(self) -> list[Path]:
        return sorted(self.out.glob(f"{self.stem}-rank*.jsonl"))

    @property
    def mine(self) -> Path:
        return self.out / f"{self.stem}-rank{rank()}.jsonl"

    def begin(self) -> None:
        """By all ranks. Note what is asked, and drop what a killed run left of a block."""
        label = Path(self.benchmark).name if os.path.isfile(self.benchmark) else self.benchmark
        sources = [p.source for p in self.problems]
        found = list(zip(self.questions, self.keys, self.graded, sources))
        asked = [dict(zip(ASKED, found[i])) for i in self.numbers]
        what = dict(benchmark=label, temperature=self.temperature, k=self.k, problems=asked)
        by_rank_0(lambda: write(self.out / f"{self.stem}-asked.json", json.dumps(what)))
        write(self.mine, to_jsonl(whole_blocks(self.mine)))
        barrier()

    def on_disk(self, right_texts: bool = False, failed: bool = True) -> dict[int, list[dict]]:
        """Number of a problem -> its rows. With texts of right responses alone, or of none: all of
        a large teacher's would not fit into memory. failed: count those without a verdict, too."""
        found: dict[int, dict[int, dict]] = defaultdict(dict)
        others: dict[Path, set[int]] = defaultdict(set)
        for file in self.files():
            for row in whole_blocks(file):
                if (i := self.number.get(row["key"])) is None:
                    continue
                if not counts(row, self.graded[i], found[i]) or not (failed or has_verdict(row)):
                    others[file].add(i)
                    continue
                if not (right_texts and row["reward"]):
                    row["response"] = ""
                found[i][row["sample"]] = self.row_of(i, row)
        whole = {i: [rows[j] for j in sorted(rows)] for i, rows in found.items()}
        whole = {i: rows for i, rows in whole.items() if len(rows) == self.k}
        self.stale = [file for file, some in others.items() if some - whole.keys()]
        return whole

    def row_of(self, i: int, row: dict) -> dict:
        p = self.problems[i]
        return row | {"problem": i, "source": p.source, "answer": p.answer}

    def grade_anew(self, done: dict[int, list[dict]], grader: Grader, at_once: int) -> None:
        """What has no verdict, or one by another gold or verifier. The ranks share the files."""
        for file in self.stale[rank() :: world_size()]:
            stale = {}
            for row in whole_blocks(file):
                i = self.number.get(row["key"])
                if i is not None and i not in done:
                    stale[i, row["sample"]] = self.row_of(i, row)
            rows = [stale[key] for key in sorted(stale)]
            for n in range(0, len(rows), at_once):
                some = rows[n : n + at_once]
                self.add(graded(some, self.problems, grader, lenient=True))

    def add(self, rows: list[dict]) -> None:
        """A block: it counts when all of it is on the disk."""
        block = uuid4().hex
        for row in rows:
            i = row["problem"]
            row |= dict(key=self.keys[i], graded=self.graded[i], block=block, of=len(rows))
        append(self.mine, *({k: v for k, v in row.items() if k != "problem"} for row in rows))


def counts(row: dict, graded: str, known: Container[int]) -> bool:
    """Is it by this gold and verifier; and if it has no verdict, is its sample not yet known?"""
    return row["graded"] == graded and (has_verdict(row) or row["sample"] not in known)


def whole_blocks(file: Path) -> list[dict]:
    """The rows of a rank's file, without the part of a block that a killed run left at its end."""
    blocks = defaultdict(list)
    for row in read_jsonl(file, **FIELDS):
        blocks[row["block"]].append({"reward": None, "lenient": None} | row)
    return [row for rows in blocks.values() if len(rows) == rows[0]["of"] for row in rows]


# ------------------------------------------------------------------ those of an evaluation
def read_asked(file: Path) -> dict[str, Any]:
    """What `begin` wrote. Raises InputError if it is something else."""
    found = read_json(file)
    try:
        temperature, k = float(found["temperature"]), int(found["k"])
        problems = [{name: str(p[name]) for name in ASKED} for p in found["problems"]]
        benchmark = str(found["benchmark"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: not what an evaluation writes ({error!r}). Remove it, and start that "
            "evaluation again"
        ) from None
    return dict(benchmark=benchmark, temperature=temperature, k=k, problems=problems)


def load_rows(out: Path) -> Rows:
    """An evaluation's directory -> (benchmark, temperature, k) -> rows of what was asked last.

    A row's `problem` is the question itself, the same in other evaluations. Without problems that
    lack a response, of an evaluation that was interrupted or goes on; it says how many.
    """
    asked = [(file, read_asked(file)) for file in sorted(out.glob("*-asked.json"))]
    if not asked:
        raise InputError(
            f"{out}: not the directory of an evaluation, or of one by an earlier version (no "
            "*-asked.json in it)"
        )
    found: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    sources_of: dict[tuple, set[str]] = defaultdict(set)  # a file's may differ in k
    stems: dict[tuple, set[str]] = defaultdict(set)
    for file, what in asked:
        stems[what["benchmark"], what["temperature"], what["k"]].add(file.name)
    for file, what in asked:
        stem = file.name.removesuffix("-asked.json")
        same = len(stems[what["benchmark"], what["temperature"], what["k"]]) > 1
        name = stem.rpartition("-t")[0] if same else what["benchmark"]
        problems = {p["key"]: p for p in what["problems"]}
        rows: dict[str, dict[int, dict]] = defaultdict(dict)
        for part in sorted(out.glob(f"{stem}-rank*.jsonl")):
            for row in whole_blocks(part):
                p = problems.get(row["key"])
                if p is not None and counts(row, p["graded"], rows[p["key"]]):
                    more = {"problem": p["question"], "source": p["source"]}
                    rows[p["key"]][row["sample"]] = row | more
        sources_of[name, what["temperature"]] |= {p["source"] for p in problems.values()}
        for samples in rows.values():
            for row in samples.values() if len(samples) == what["k"] else ():
                found[name, what["temperature"], what["k"]][row["source"]].append(row)
        if left := sum(len(rows[key]) != what["k"] for key in problems):
            left_out = f"{left} of {len(problems)} problems of {stem}, which lack responses"
            say(f"{out}: without {left_out}. The command that made it goes on")
        judged = [has_verdict(row) for samples in rows.values() for row in samples.values()]
        if failed := judged.count(False):
            say(f"{out}: no verdict on {failed} responses of {stem}: they count as not right")
    if not found:
        raise InputError(f"{out}: has no responses yet")
    return {
        (f"{name}/{source}" if len(sources_of[name, t]) > 1 else name, t, k): rows
        for (name, t, k), sources in sorted(found.items())
        for source, rows in sorted(sources.items())
    }
