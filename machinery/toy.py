r"""The laptop world: a small arithmetic, its teacher, a base model with the skill, not the habit.

    python -m machinery.toy --goals 0.2 --out DIR    # another base; then: luffy.py --model DIR

A problem gives two terms of a sequence, its rule x_n = x_{n-1} op x_{n-2} (mod 7), and the letter
of the term that is asked for; letters are consecutive. The answer is the last three terms.

    prompt    b2,c5,-;e?
    trace     d=5-2=3;e=3-5=5;\boxed{535}

`easy` problems take 1 or 2 steps, `hard` ones 4 to 6. The teacher is right in the end, but
detours: it `check`s a step, or writes a wrong value and says `wait`. The base model has read short
answers to easy questions, and listings: long chains of steps without a question or a box. So it has
the skill for a hard problem, but after two steps it boxes: to go on is right but unlikely. The knob
is GOALS, the share of listings that stop at a letter named in their prompt, as a solution must: the
fewer, the less likely under the base model is a whole solution, and the more shaping matters. Out
of distribution (`ood`) are hard problems with the operator *, which the base model knows and no
trace shows. `medium` problems are short ones with ^ (2 x_{n-1} + x_{n-2}), which it has seen meant
as + four times in five. It solves a few samples in a hundred, so RL alone has something to learn
from.
"""

import hashlib
import json
import math
import os
import random
import shutil
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from machinery.arguments import Parser, path, ranged
from machinery.kinds import Qwen2ForCausalLM, Tokenizer
from machinery.processes import InputError

# What the laptop's runs differ in from the defaults, for every algorithm alike: sizes, and what
# suits a model of 114 thousand parameters. Nothing that tells one algorithm from another.
# fmt: off
RECIPE = dict(
    data="toy", eval_data="toy/val", steps=200, problems_per_step=16, max_prompt_tokens=32,
    max_response_tokens=96, lr=3e-4, beta2=0.95, weight_decay=0.0, entropy_coef=0.0,
    updates_per_step=2, token_budget=4096, save_every=50, sampler="torch", checkpointing=False,
    scale=1.0,
    note='The toy: each value is the sum (or difference) of the two before it, modulo 7. From the '
         'two that are given the policy has to go on until the letter that is asked for; the '
         'answer is the last three values. The base model boxes after two steps, and hard problems '
         'take more. In medium ones ^ is 2 x + y, and it mostly takes it for +. '
         'The teacher sometimes writes "check" and a step again, or a wrong value, "wait" and the '
         'right one.')
# fmt: on

# ------------------------------------------------------------------ problems
MODULUS = 7
LETTERS = "abcdefghijkl"
OPERATORS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
OPERATORS["^"] = lambda x, y: 2 * x + y
EASY, HARD = (1, 2), (4, 5, 6)  # steps
KINDS = {"easy": ("+-", EASY), "medium": ("^", EASY), "hard": ("+-", HARD), "ood": ("*", HARD)}
SIZES = {  # problems of each kind in each split; no problem is in two splits
    "train": dict(easy=64, medium=64, hard=128),
    "val": dict.fromkeys(KINDS, 64),
    "test": dict.fromkeys(KINDS, 200),
    # This toy and its RECIPE were tuned on train and dev.
    "dev": dict.fromkeys(KINDS, 64),
}


class Chain:
    """A sequence: its first letter, first two terms, operator, and the number of steps to ask.

    rule: the operator by which its terms are worked out, if that is another one.
    """

    def __init__(self, start: int, x: int, y: int, op: str, steps: int, rule: str = ""):
        self.start, self.op, self.steps, self.terms = start, op, steps, [x, y]
        while len(self.terms) < max(HARD) + 4:
            self.terms.append(OPERATORS[rule or op](self.terms[-1], self.terms[-2]) % MODULUS)

    def by(self, rule: str) -> "Chain":
        return Chain(self.start, *self.terms[:2], self.op, self.steps, rule)

    def letter(self, i: int) -> str:
        return LETTERS[(self.start + i) % len(LETTERS)]

    def question(self, mark: str = "?") -> str:
        x, y, *_ = self.terms
        goal = self.letter(self.steps + 1)
        return f"{self.letter(0)}{x},{self.letter(1)}{y},{self.op};{goal}{mark}"

    def answer(self, steps: int) -> str:
        return "".join(map(str, self.terms[steps - 1 : steps + 2]))

    def is_fair(self) -> bool:
        """No other stopping point gives the right box, nor an early one after a single slip.

        Any wrong value x_n is followed by values that fit it, so a box that begins with the right
        digit is one slip from being right by luck. Nor does a short answer by another operator.
        """
        right = self.answer(self.steps)
        luck = self.steps in HARD and right[0] in (self.answer(n)[0] for n in (1, 2, 3))
        others = [self.by(rule) for rule in OPERATORS if rule != self.op]
        luck = luck or any(right == c.answer(n) for c in others for n in (1, 2, 3))
        return not luck and all(
            self.answer(n) != right for n in range(1, self.steps + 3) if n != self.steps
        )


def working(chain: Chain, steps: int, rng: random.Random, check: float, wait: float) -> str:
    """`steps` steps, written out; each detours with the probabilities `check` and `wait`."""
    text = ""
    for i in range(2, steps + 2):
        y, x, value = chain.terms[i - 2 : i + 1]
        step, luck = f"{chain.letter(i)}={x}{chain.op}{y}=", rng.random()
        if luck < check:
            text += f"{step}{value}check"
        elif luck < check + wait:
            text += f"{step}{(value + rng.randrange(1, MODULUS)) % MODULUS}wait"
        text += f"{step}{value};"
    return text


def response(chain: Chain, steps: int, rng: random.Random, check: float, wait: float) -> str:
    return working(chain, steps, rng, check, wait) + f"\\boxed{{{chain.answer(steps)}}}"


@cache
def splits() -> dict[str, list[tuple[str, Chain]]]:
    """split -> [(kind, chain), ...]: all fair problems in one fixed shuffle, dealt out in turn."""
    decks, starts, values = {}, range(len(LETTERS)), range(MODULUS)
    for kind, (operators, steps) in KINDS.items():
        every = (Chain(*facts) for facts in product(starts, values, values, operators, steps))
        decks[kind] = [chain for chain in every if chain.is_fair()]
        random.Random(f"toy {kind}").shuffle(decks[kind])
    return {
        split: [(kind, decks[kind].pop()) for kind, n in sizes.items() for _ in range(n)]
        for split, sizes in SIZES.items()
    }


def rows(split: str = "train") -> list[dict]:
    """A split (a key of SIZES) as rows of a data set, in the schema of the paper's: see data.py.

    Their sources are easy, medium, hard and ood.
    """
    if split not in SIZES:
        raise InputError(f"toy/{split}: the toy's splits are {', '.join(SIZES)}")
    solve = partial(response, rng=random.Random(f"toy teacher {split}"), check=0.2, wait=0.1)
    return [
        {
            "data_source": kind,
            "prompt": [{"role": "user", "content": chain.question()}],
            "target": [{"role": "assistant", "content": solve(chain, chain.steps)}],
            "reward_model": {"ground_truth": chain.answer(chain.steps)},
        }
        for kind, chain in splits()[split]
    ]


# ------------------------------------------------------------------ the base model
GOALS = 0.5  # the knob: share of the listings that stop at the letter they name
CONFIDENCE = 2.0  # the trained head is multiplied by this: no sample goes on by chance
LISTINGS = 0.2  # share of documents that are listings
RIGHT = 0.7  # share of answers that stop at the right step, not one early or late
KNOWN = 0.2  # share of documents that take ^ for what it is; others take it for +
DETOUR = 0.05  # share of steps with a detour, half of them a check, half a wait


@cache
def held_out() -> set[str]:
    return {chain.question() for split in ("val", "test") for _, chain in splits()[split]}


def document(rng: random.Random, goals: float) -> tuple[str, str]:
    """One (prompt, response) of the base model's corpus; never a question of val or test."""
    while True:
        start, x, y = (rng.randrange(n) for n in (len(LETTERS), MODULUS, MODULUS))
        chain = Chain(start, x, y, rng.choice("++--**^"), steps=rng.choice(EASY))
        if chain.question() not in held_out():
            break
    if chain.op == "^" and rng.random() > KNOWN:
        chain = chain.by("+")
    if rng.random() < LISTINGS:
        steps = rng.randint(2, 7)
        chain.steps = steps if rng.random() < goals else rng.randint(2, 7)
        return chain.question(mark="."), working(chain, steps, rng, DETOUR / 2, DETOUR / 2)
    steps = chain.steps if rng.random() < RIGHT else sum(EASY) - chain.steps
    return chain.question(), response(chain, steps, rng, DETOUR / 2, DETOUR / 2)


def make_tokenizer() -> Tokenizer:
    """One token a character, and one for each word the teacher uses.

    A Qwen2Tokenizer without merges: the only kind that AutoTokenizer loads back unchanged when it
    stands next to a Qwen2 config.
    """
    from transformers import AddedToken, Qwen2Tokenizer

    special = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
    words = ["\\boxed{", "check", "wait"]
    characters = list("0123456789abcdefghijklmnopqrstuvwxyz=+-*^,;?.{}")
    vocab = {token: i for i, token in enumerate(special + words + characters)}
    named = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None)
    named |= dict(additional_special_tokens=["<user>", "<assistant>"])
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **named)
    tokenizer.add_tokens([AddedToken(w, normalized=False, special=False) for w in words])
    tokenizer.chat_template = (
        "{# boxed, without being asked #}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_model(tokenizer: Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A tiny Qwen2. Heads of 32: the smallest that vLLM's CPU attention takes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=256, vocab_size=len(tokenizer))
    tokens = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    more = dict(bos_token_id=None, initializer_range=0.08, tie_word_embeddings=False)
    more |= dict(luffy_recipe=RECIPE)  # not Qwen2's: see machinery.model.recipe
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **tokens, **more))


def train_base(
    goals: float, seed: int, steps: int = 500, documents: int = 96, lr: float = 2e-3
) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """Next-token prediction on the responses of `steps` x `documents` documents. Under a minute."""
    tokenizer, rng = make_tokenizer(), random.Random(f"toy base {seed}")
    model = make_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)

    def warm_up_then_cosine_to_a_tenth(step: int) -> float:
        return min((step + 1) / 30, 0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine_to_a_tenth)
    for _ in tqdm(range(steps), desc="training the toy's base model", leave=False):
        batch = sorted((document(rng, goals) for _ in range(documents)), key=lambda d: len(d[1]))
        short = sum(len(text) <= 40 for _, text in batch)
        tokens = 0
        for part in filter(None, (batch[:short], batch[short:])):  # two parts: less padding
            ids, labels = pad_documents(part, tokenizer)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            loss.backward()
            tokens += (labels >= 0).sum()
        for parameter in model.parameters():
            parameter.grad /= tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.lm_head.weight.data *= CONFIDENCE
    return model, tokenizer


def pad_documents(
    batch: list[tuple[str, str]], tokenizer: Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) ids and labels, right-padded; the label is -100 on prompts and padding."""
    texts = [f"<user>{prompt}<assistant>{text}<eos>" for prompt, text in batch]
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    opening = ids == tokenizer.convert_tokens_to_ids("<assistant>")
    answer = opening.cumsum(1).bool() & ~opening & (ids != tokenizer.pad_token_id)
    return ids, ids.where(answer, -100)


def save_base(directory: Path, goals: float, seed: int) -> Path:
    return save(*train_base(goals, seed), directory)


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, directory: Path) -> Path:
    """Write a base model where from_pretrained finds it, complete or not at all."""
    half_written = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    model.save_pretrained(half_written)
    tokenizer.save_pretrained(half_written)
    try:
        half_written.rename(directory)
    except OSError:  # another run was faster
        shutil.rmtree(half_written)
    return directory


def made_before() -> Path:
    """Weights of the default base model, which are in the project for as long as they are these."""
    rng, tokenizer = random.Random("toy base 0"), make_tokenizer()
    documents = [document(rng, GOALS) for _ in range(1000)]
    shapes = [(name, *p.shape) for name, p in make_model(tokenizer, 0).named_parameters()]
    facts = [documents, tokenizer.get_vocab(), shapes, CONFIDENCE, train_base.__defaults__]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return Path(__file__).with_name(f"toy-{name}.safetensors")


def base_model() -> Path:
    """The default base model, in a directory: made before, or trained if the toy is another now."""
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    directory = Path(os.environ.get("LUFFY_CACHE", "runs")) / f"toy-base-{fingerprint}"
    if directory.exists():
        return directory
    if not (weights := made_before()).exists():
        return save_base(directory, GOALS, seed=0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    model.load_state_dict(load_file(weights))
    return save(model, tokenizer, directory)


if __name__ == "__main__":
    parser = Parser(description="Train a base model.")
    parser.add_argument("--out", type=path, required=True, help="a directory that does not exist")
    goals = f"share of listings that stop at the letter they name ({GOALS})"
    parser.add_argument("--goals", type=ranged(float, 0, 1), default=GOALS, help=goals)
    parser.add_argument("--seed", type=ranged(int, 0), default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists; name a new directory")
    save_base(args.out, args.goals, args.seed)
    print(f"base model in {args.out}; next: python luffy.py --model {args.out}")
