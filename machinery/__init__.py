"""What a reader of the paper may skip. Nothing in here imports luffy, data, verify or eval.

processes       ranks of torchrun and their GPUs, numbers over all of them, how a program ends
files           .jsonl logs, text that is written whole or not at all, a directory's one writer
printing        terminals without UTF-8, pipes that close: a tool ends there, a run goes on
arguments       what argparse lacks: ranges, no empty texts, no tracebacks
flags           a dataclass as a command line; values that cannot be
kinds           of transformers' objects, for annotations, without importing it
sources         rows of a file, the toy or a hub data set, and what their cells may be
model           models found and loaded; log-probs of packed rows, attention, the vocabulary head
probe           does a model compute what we take it to compute? asked at load
batches         trajectories, and micro-batches of them
rivals          other papers' methods, as rows of luffy.py's tables
prefixes        rollouts that go on from a prefix of their trace
optimizer       AdamW, its state shared out among the ranks
samplers        what samples: the protocol, transformers alone, options of vLLM's engine
caches          keys and values in place, and attention, of transformers' sampling
metrics         what is measured of a step
track           the same in wandb, trackio or tensorboard
server          what samples instead of a local model: an OpenAI-compatible server
distill         a teacher's traces, from the rows of an evaluation
responses       an evaluation's directory: whose its responses are, and which count
scores          avg@k and pass@k on held-out problems; what a run came to
run_directory   log, when to save, resumption
checkpoints     written, read back, checked, tried before the first step
plan            --dry_run: batches, tokens and memory of each GPU
preflight       --preflight: what a run needs, proven on this machine
look            python data.py: what a file of problems comes to
page, plots     report.html, curves.png and a picture of evaluations
notation        how an answer is written: one way for what can be written in several, its parts
pool, reward    worker processes that can be killed; a user's reward function in them
published       the paper's benchmarks, systems, prompts and scores
toy             the laptop's world: problems, teacher, base model
"""
