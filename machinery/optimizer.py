"""AdamW on float32 masters, its state shared out among the ranks (ZeRO-1, by whole tensors).

And DDP, whose all-reduced gradients it takes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from machinery.processes import rank, world_size

THREADS = torch.get_num_threads()


def data_parallel(module: nn.Module) -> DDP:
    """DDP with one set of gradients for good: views of buckets that are made here and stay.

    Left alone it has two for a while, both among the activations: gradients beside the buckets in
    the first update, new buckets beside the old ones in the second. So the backward pass after
    which it makes its last buckets comes at once. It reaches all parameters, the last one first.
    """
    sparse = getattr(module, "sparse", False)
    policy = DDP(module, gradient_as_bucket_view=True, find_unused_parameters=sparse)
    nothing = 0 * sum(p.sum() for p in policy.parameters() if p.requires_grad)
    policy.reducer.prepare_for_backward([nothing] * sparse)
    nothing.backward()
    policy.reducer._rebuild_buckets()  # else DDP.forward calls it, in the second update
    return policy


class ShardedAdamW:
    """AdamW on float32 masters of the parameters; each rank keeps the state of its share of them.

    The gradients must be the same on all ranks, as after DDP's all-reduce. A rank keeps whole
    tensors, about 1/ranks of 12 bytes a parameter. Float32 parameters are their own masters (8
    bytes), and with one rank this is then torch.optim.AdamW. Pure bfloat16 AdamW is wrong at lr
    1e-6: most of its updates round to nothing. For another optimizer override `optimizer_of`.

    offload: masters and state are on the host, and the step is taken there. A tensor's gradient is
    copied to it when all micro-batches and ranks have added to it, and its master's values back.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        offload: bool = False,
    ):
        self.settings = dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        self.params = [p for p in params if p.requires_grad]
        load = [0] * world_size()
        self.owner = [0] * len(self.params)
        for i in sorted(range(len(self.params)), key=lambda i: -self.params[i].numel()):
            self.owner[i] = load.index(min(load))  # whole tensors, the largest first
            load[self.owner[i]] += self.params[i].numel()
        mine = [i for i, owner in enumerate(self.owner) if owner == rank()]
        self.offload, where = offload, dict(device="cpu", copy=True) if offload else {}
        self.mine = {i: self.params[i].detach().to(dtype=torch.float32, **where) for i in mine}
        self.optimizers = {i: self.optimizer_of(master) for i, master in self.mine.items()}

    def optimizer_of(self, master: Tensor) -> torch.optim.Optimizer:
        """Of one parameter's master alone: temporary tensors are no larger; on a CPU none."""
        fused = True if master.device.type == "cpu" else None
        optimizer = torch.optim.AdamW([master], **self.settings, fused=fused)
        # Made in the first step they would take the activations' cached memory apart.
        moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[master] = {"step": torch.tensor(0.0), **moments}
        return optimizer

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = lr

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clip to the global norm `max_norm`, step, round once, share. -> the norm before clipping.

        Raises FloatingPointError, with nothing changed, if the gradient is not finite.
        """
        norm = torch.stack([p.grad.float().norm() for p in self.params]).norm()
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()}: this update was not made. "
                "See the end of metrics.jsonl; try a smaller --lr"
            )
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        scale = scale.cpu() if self.offload else scale
        for i, master in self.mine.items():
            grad = self.params[i].grad
            if self.offload:
                master.grad = on_host(on_host(grad), torch.float32).mul_(scale)
            else:
                master.grad = grad.float() * scale
            with many_threads() if self.offload else nullcontext():
                self.optimizers[i].step()
            master.grad = None
        self.share()
        return norm.item()

    @torch.no_grad()
    def share(self) -> None:
        """Round this rank's masters into their parameters, and give them to the other ranks."""
        for i, master in self.mine.items():
            dtype = self.params[i].dtype
            self.params[i].copy_(on_host(master, dtype) if self.offload else master)
        if world_size() > 1:
            shares = [(p.detach(), owner) for p, owner in zip(self.params, self.owner)]
            for work in [dist.broadcast(p, owner, async_op=True) for p, owner in shares]:
                work.wait()

    def zero_grad(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.grad.zero_()  # in place: the gradients are views of DDP's buckets

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Index of a parameter -> its master and moments, for this rank's share."""
        masters = self.mine.items()
        return {i: {"master": m, **self.optimizers[i].state[m]} for i, m in masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Take this rank's share from the state of all ranks. KeyError if it is not all there."""
        for i, master in self.mine.items():
            saved = dict(state[i])
            master.copy_(saved.pop("master"))
            own = self.optimizers[i].state[master]
            for name, value in saved.items():
                if name in own:  # in place: there is no room for a second set of moments
                    own[name].copy_(value)
                else:  # AdamW keeps its scalar `step` on the CPU
                    own[name] = value.to(master.device if value.dim() else "cpu", copy=True)


@contextmanager
def many_threads() -> Iterator[None]:
    """As many of torch's as at the start. vLLM leaves one, and looks for one when it samples."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_host(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy that a GPU reads and writes fast: in page-locked memory, which torch's cache keeps."""
    empty = torch.empty_like(x, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available())
    return empty.copy_(x)
