"""Runs a program of this project with matrix products in bfloat16: hurry.py luffy --algo mixed ...

CPUs with AMX make them four times as fast. Weights, sums and AdamW stay in float32.
"""

import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AttentionInterface  # noqa: E402

from machinery import caches  # noqa: E402
from machinery.model import packed_attention  # noqa: E402
from machinery.run_directory import Run  # noqa: E402


class Switch(torch.autograd.Function):
    """The same tensors; products are made as `now` from here on, as `later` after its backward."""

    @staticmethod
    def forward(ctx, now: str, later: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.later = later
        torch.set_float32_matmul_precision(now)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple:
        torch.set_float32_matmul_precision(ctx.later)
        return None, None, *gradients


def precise(attention: Callable) -> Callable:
    """With products in float32: they are small, and would take three times as long."""

    def with_switches(module, *tensors, **options):
        usual = torch.get_float32_matmul_precision()
        qkv = Switch.apply("highest", usual, *tensors[:3])
        out = attention(module, *qkv, *tensors[3:], **options)[0]
        return Switch.apply(usual, "highest", out)[0], None

    return with_switches


def hurry() -> None:
    """Once the models are loaded: loading compares log-probs to float32's rounding."""
    AttentionInterface.register("grouped", precise(caches.grouped_attention))
    AttentionInterface.register("packed", precise(packed_attention))
    torch.set_float32_matmul_precision("medium")


def main(argv: list[str]) -> None:
    """Run a module of the project; it ends with the process that started it."""
    parent, begin = os.getppid(), Run.begin

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    def begin_and_hurry(*arguments) -> None:
        begin(*arguments)
        hurry()

    threading.Thread(target=follow, daemon=True).start()
    Run.begin = begin_and_hurry
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
