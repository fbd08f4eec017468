"""Variants that replace a function of luffy.py. Each file runs by itself:

    python -m forks.orz                                                     # on the toy
    torchrun --nproc_per_node=8 -m forks.orz --model Qwen2.5-Math-7B

It imports luffy, has a row of its own and gives luffy.main what it replaces. All flags of luffy.py
work, and its own are in --help.
"""
