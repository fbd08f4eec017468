"""Variants that replace functions of luffy.py. Each runs from the project's directory:

    python -m forks.orz                                                     # on the toy
    torchrun --nproc_per_node=8 -m forks.trapo --model Qwen2.5-Math-7B

It imports luffy, has a row of its own and gives luffy.main what it replaces. It takes luffy.py's
flags, but for those that it has to refuse, and its own: see --help. second_model is no fork.
"""
