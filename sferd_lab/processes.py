"""Several processes as one: who this is, what its share is, waiting, putting parts together. In a single process all of it is trivial.

The processes are torch.distributed's: ``torchrun``, ``accelerate launch`` or ``launch`` here start them, one a GPU, on one machine or many.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from sferd_lab.errors import SferdError

# What one process does alone while the others wait (a feature network, a mixture prior) may take longer than the default half hour.
PATIENCE = timedelta(hours=6)


def on_cpu(device: str) -> bool:
    """Whether the setting "auto" or "cpu" means the CPU here. accelerate has to be told: left to itself without a GPU, it takes several
    processes for one, and each would train alone.
    """
    return device == "cpu" or not torch.accelerator.is_available()


def connect(cpu: bool) -> None:
    """Join the other processes, where a launcher started several; ``cpu`` keeps them off a GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=PATIENCE)


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        dist.barrier()


def once(work: Callable[[], object]) -> None:
    """Have the first process do ``work`` while the others wait for it. If it fails, all do: the others with SferdError and its words."""
    if count() == 1:
        work()
        return
    failure: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as error:  # whatever it is, the others wait to be told
            failure = error
    words = _from_the_first("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if words:
        raise SferdError(f"the first of {count()} processes failed: {words}")


def _from_the_first(text: str) -> str:
    """The first process's ``text``, as far as 1,000 bytes hold it, in all processes."""
    # As numbers: torch's own way to send objects is pickle.
    told = torch.zeros(1000, dtype=torch.uint8)
    spelled = torch.tensor(list(text.encode()[: len(told)]), dtype=torch.uint8)
    told[: len(spelled)] = spelled
    if "gloo" not in dist.get_backend():
        told = told.to(torch.accelerator.current_accelerator())
    dist.broadcast(told, src=0)
    return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")


def share(n: int, unit: int) -> range:
    """The part of 0..n - 1 that is this process's: whole units of ``unit`` where there are enough of them to give each process one.

    In order of rank the parts make the whole. Raises SferdError when there are fewer items than processes.
    """
    if n < count():
        raise SferdError(f"{n} images for {count()} processes; allowed: one image a process or more")
    unit = unit if -(-n // unit) >= count() else 1
    units = -(-n // unit)
    first, stop = (units * (rank() + step) // count() * unit for step in (0, 1))
    return range(first, min(stop, n))


def gather(part: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The rows of all processes' ``part`` (n, ...), of any number, in order of rank, on the CPU; ``device`` is the network's."""
    if count() == 1:
        return part.cpu()
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(part)], device=device))
    longest = int(torch.cat(sizes).max())
    padded = torch.zeros(longest, *part.shape[1:], dtype=part.dtype, device=device)
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([rows[: int(size)] for rows, size in zip(parts, sizes, strict=True)]).cpu()


class Everyone(torch.autograd.Function):
    """The rows (B, ...) of several processes, as many of each, one after another: (processes B, ...). Gradients find their way back."""

    @staticmethod
    def forward(ctx: object, part: Tensor) -> Tensor:
        """All rows, in order of rank."""
        parts = [torch.empty_like(part) for _ in range(count())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        """What all processes' losses say of this one's rows."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(count())[rank()]


def launch(work: Callable[..., object], arguments: tuple[object, ...], processes: int) -> None:
    """Run ``work(*arguments)`` in that many new processes on this machine, by accelerate's ``notebook_launcher``; wait for them.

    They are forked: call it before anything in this process has used a GPU. Raises SferdError when one of them fails.
    """
    from accelerate import notebook_launcher
    from accelerate.state import AcceleratorState
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    AcceleratorState._reset_state(reset_partial_state=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        notebook_launcher(_forked, (work, arguments), num_processes=processes, master_addr="127.0.0.1", use_port=str(port))
    except ChildFailedError as error:
        raise SferdError(f"one of {processes} processes failed: {error.get_first_failure()[1].message}") from None


def _forked(work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)  # a forked process has none of its parent's threads, and waits for them forever
    work(*arguments)
