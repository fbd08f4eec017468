r"""The paper's evaluation as tables: benchmarks, systems with their prompts, published numbers.

Sources: arXiv:2504.14945 (v5) and its repository, ElliottYan/LUFFY at 01f4ae0, README and
eval_scripts/generate_vllm.py. The prompts are those of the systems' own repositories: Oat-Zero and
PRIME-Zero from sail-sg/understand-r1-zero at dfca49d (evaluate_model.py), OpenReasoner-Zero from
Open-Reasoner-Zero at 3fdd9a0 (playground/zero_setting_base.py), SimpleRL's own from
hkust-nlp/simpleRL-reason at cf1c785 (examples/simplelr_math_eval/utils.py). For Qwen2.5-7B-Instruct
and Llama-3.1-8B-Instruct no prompt is given: those here are ours.
"""

from dataclasses import dataclass

OFFICIAL = ("valid.all.parquet", "six_benchmarks_luffy.parquet", "six_benchmarks_unique.jsonl")


@dataclass(frozen=True)
class Benchmark:
    """Where the problems of a benchmark are, and how the paper samples them."""

    hub: str  # NAME, NAME:SPLIT or NAME/CONFIG:SPLIT; or a source of load_problems
    k: int = 1  # responses to each problem
    files: tuple[str, ...] = ()  # in --data_dir, beside NAME.jsonl and NAME.parquet
    source: str = ""  # of its rows, in files that hold several benchmarks
    letters: bool = False  # the answer is a letter of a choice
    problems: int = 0  # how many there are, where that is known
    max_tokens: int = 8192
    temperature: float = 0.6
    built_in: bool = False  # made by this program: no files, and asked as it stands


# In the order of the paper's columns: six in distribution, three out of it, then others.
# fmt: off
BENCHMARKS = {
    "aime24": Benchmark("lkevinzc/math-eval:aime", 32, OFFICIAL, "aime", problems=30),
    "aime25": Benchmark("math-ai/aime25:test", 32, OFFICIAL, "aime25", problems=30),
    "amc": Benchmark("lkevinzc/math-eval:amc", 32, OFFICIAL, "amc", problems=83),
    "math500": Benchmark("lkevinzc/math-eval:math", 1, OFFICIAL, "math", problems=500),
    "minerva": Benchmark("lkevinzc/math-eval:minerva", 1, OFFICIAL, "minerva", problems=272),
    "olympiad": Benchmark("lkevinzc/math-eval:olympiad_bench", 1, OFFICIAL, "olympiad_bench",
                          problems=675),
    "arc_c": Benchmark("allenai/ai2_arc/ARC-Challenge:test", 1,
                       ("valid.arc_c.parquet", "arc_c_luffy.parquet"), letters=True, problems=1172),
    "gpqa": Benchmark("Idavidrein/gpqa/gpqa_diamond:train", 1, ("valid.gpqa.parquet",),
                      letters=True, problems=198),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro:test", 1, ("valid.mmlu_pro.parquet",), letters=True),
    "gsm8k": Benchmark("openai/gsm8k/main:test", 1, ("gsm8k_test.jsonl",), problems=1319),
    "toy": Benchmark("toy/test", 8, built_in=True),
}
# fmt: on
SIX = tuple(BENCHMARKS)[:6]  # "Avg." is their unweighted mean
OUT_OF_DISTRIBUTION = tuple(BENCHMARKS)[6:9]
GROUPS = {"six": SIX, "ood": OUT_OF_DISTRIBUTION}  # names for --bench

# How a problem becomes the text that a model sees. `own`: the tokenizer's chat template on the
# messages of the data, as in training; `own_no_system`: without their system message, as the
# official evaluation of LUFFY, whose template has one of its own.
# fmt: off
TEMPLATES = {
    "own": None,
    "own_no_system": None,
    "plain": "{problem}",
    "qwen": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"),
    "simplerl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{problem}\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"),
    "prime_zero": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think> <answer> answer here </answer>. User: {problem}\n\n"
        "Present the answer in LaTex format: \\boxed{Your answer}. Assistant:"),
    "openreasoner_zero": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>. User: You must "
        "put your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And "
        "your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "This is the problem:\n{problem}\nAssistant: <think>"),
}
# fmt: on


@dataclass(frozen=True)
class System:
    """A row of the paper's tables: a published checkpoint, its prompt, its published scores (%)."""

    model: str  # on the hub; "" where none was published
    template: str
    average: float  # of the six
    six: tuple[float, ...]  # in the order of SIX
    ood: tuple[float, ...] = ()  # in the order of OUT_OF_DISTRIBUTION; of Table 1 alone


# fmt: off
SYSTEMS = {
    "qwen-math-7b": System("Qwen/Qwen2.5-Math-7B", "qwen", 19.0,
                           (11.5, 4.9, 31.3, 43.6, 7.4, 15.6), (18.2, 11.1, 16.9)),
    "qwen-math-7b-instruct": System("Qwen/Qwen2.5-Math-7B-Instruct", "qwen", 37.6,
                                    (12.5, 10.2, 48.5, 80.4, 32.7, 41.0), (70.3, 24.7, 34.1)),
    "simplerl-zero": System("hkust-nlp/Qwen-2.5-Math-7B-SimpleRL-Zero", "qwen", 37.4,
                            (27.0, 6.8, 54.9, 76.0, 25.0, 34.7), (30.2, 23.2, 34.5)),
    "openreasoner-zero": System("Open-Reasoner-Zero/Open-Reasoner-Zero-7B", "openreasoner_zero",
                                41.0, (16.5, 15.0, 52.1, 82.4, 33.1, 47.1), (66.2, 29.8, 58.7)),
    "prime-zero": System("PRIME-RL/Eurus-2-7B-PRIME-Zero", "prime_zero", 40.7,
                         (17.0, 12.8, 54.0, 81.4, 39.0, 40.3), (73.3, 18.2, 32.7)),
    "oat-zero": System("sail/Qwen2.5-Math-7B-Oat-Zero", "qwen", 43.7,
                       (33.4, 11.9, 61.2, 78.0, 34.6, 43.4), (70.1, 23.7, 41.7)),
    "on-policy": System("", "own_no_system", 45.5,
                        (25.1, 15.3, 62.0, 84.4, 39.3, 46.8), (82.3, 40.4, 49.3)),
    "sft": System("Elliott/Qwen2.5-Math-7B-SFT", "own_no_system", 44.1,
                  (22.2, 22.3, 52.8, 82.6, 40.8, 43.7), (75.2, 24.7, 42.7)),
    "rl-sft-loss": System("", "own_no_system", 40.1,
                          (19.5, 16.4, 49.7, 80.4, 34.9, 39.4), (71.2, 23.7, 43.2)),
    "sft-rl": System("Elliott/Qwen2.5-Math-7B-SFT-RL", "own_no_system", 48.2,
                     (25.8, 23.1, 62.7, 87.2, 39.7, 50.4), (72.4, 24.2, 37.7)),
    "luffy": System("Elliott/LUFFY-Qwen-Math-7B-Zero", "own_no_system", 50.1,
                    (29.4, 23.1, 65.6, 87.6, 37.5, 57.2), (80.5, 39.9, 53.0)),
    "luffy-860": System("", "own_no_system", 50.4,
                        (30.7, 22.5, 66.2, 86.8, 41.2, 55.3), (81.8, 49.0, 54.7)),
    "qwen-math-1.5b": System("Qwen/Qwen2.5-Math-1.5B", "qwen", 16.0,
                             (7.2, 3.6, 26.4, 28.0, 9.6, 21.2)),
    "qwen-math-1.5b-instruct": System("Qwen/Qwen2.5-Math-1.5B-Instruct", "qwen", 35.7,
                                      (12.1, 8.9, 48.1, 77.4, 28.7, 39.1)),
    "sft-1.5b": System("", "own_no_system", 31.9, (11.7, 13.2, 37.8, 70.6, 26.8, 31.3)),
    "on-policy-1.5b": System("", "own_no_system", 30.0, (11.8, 7.7, 40.2, 61.8, 26.8, 32.0)),
    "luffy-1.5b": System("Elliott/LUFFY-Qwen-Math-1.5B-Zero", "own_no_system", 38.0,
                         (16.0, 13.1, 47.1, 80.2, 30.5, 41.0)),
    "qwen-instruct": System("Qwen/Qwen2.5-7B-Instruct", "qwen", 34.4,
                            (11.7, 7.5, 43.8, 71.8, 30.9, 40.4)),
    "sft-instruct": System("", "own_no_system", 29.0, (7.9, 9.2, 36.0, 68.6, 21.3, 31.1)),
    "on-policy-instruct": System("", "own_no_system", 35.2, (14.1, 8.3, 43.5, 74.0, 33.8, 37.6)),
    "luffy-instruct": System("Elliott/LUFFY-Qwen-Instruct-7B", "own_no_system", 40.7,
                             (17.7, 14.8, 50.9, 82.0, 31.3, 47.4)),
    "llama-instruct": System("meta-llama/Llama-3.1-8B-Instruct", "own", 17.1,
                             (5.1, 0.4, 18.6, 44.6, 19.5, 14.1)),
    # from Llama-3.1-8B:
    "sft-llama": System("", "own_no_system", 5.9, (0.5, 0.1, 5.4, 20.2, 4.0, 5.3)),
    "on-policy-llama": System("", "own_no_system", 9.6, (0.3, 0.5, 9.4, 23.4, 17.6, 6.1)),
    "luffy-llama": System("", "own_no_system", 13.2, (1.9, 0.1, 13.5, 39.0, 15.1, 9.6)),
}
# fmt: on
