"""Operations, memory and seconds of a piece of code, and calls that take turns."""

from __future__ import annotations

import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MIB = 2**20


def in_turns(calls: Sequence[Callable[[Callable[[], None]], None]], after_round: Callable[[], object]) -> None:
    """Make all calls at once, each in a thread, of which one runs at a time: until it calls the `pause` it was given.

    After each round of turns `after_round` is called here.
    """
    errors: list[BaseException] = []

    def run(call: Callable, turn: threading.Semaphore, back: threading.Semaphore) -> None:
        def pause() -> None:
            back.release()
            turn.acquire()
            if errors:
                raise SystemExit  # another call has failed

        turn.acquire()
        try:
            if not errors:
                call(pause)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.add(turn)
            back.release()

    ended: set[threading.Semaphore] = set()
    turns = [threading.Semaphore(0) for _ in calls]
    back = threading.Semaphore(0)
    for call, turn in zip(calls, turns):
        threading.Thread(target=run, args=(call, turn, back), daemon=True).start()
    while len(ended) < len(calls):
        for turn in turns:
            if turn not in ended:
                turn.release()
                back.acquire()
        if not errors:
            after_round()
    if errors:
        raise errors[0]


def matmul_rate(dtype: torch.dtype, device: str = "cpu", side: int = 1024, repeats: int = 3) -> float:
    """Operations per second of a large matrix product, the best of `repeats`: what this machine attains now."""
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        start = now(device)
        a @ b
        best = min(best, now(device) - start)
    return 2 * side**3 / best


def operation_counter() -> FlopCounterMode:
    """Counts the operations of matrix products, and of attention, whose CPU kernel PyTorch does not count itself."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        forward: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules:
    """In the place of the counter's tracker of modules, whose hooks refuse `autograd.grad` with respect to a leaf."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


def now(device: str) -> float:
    """Seconds, once the device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class MemoryMeter:
    """The most bytes alive at once, of what is allocated between `start` and `stop`: tensors, and arrays of numpy.

    On a CPU it sees what operations return, not the scratch space within one; on CUDA, all that is allocated.
    """

    def __init__(self, device: str = "cpu"):
        self.cuda = torch.device(device).type == "cuda"

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with StorageWatch():  # what is imported at the first use is not counted
                torch.zeros(1)
            tracemalloc.start()
            self.watch = StorageWatch()
            self.watch.__enter__()

    def stop(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        self.watch.__exit__(None, None, None)
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return self.watch.peak + arrays


class StorageWatch(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        before = {id(t.untyped_storage()) for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)}
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if (
                storage is not None and id(storage) not in before and storage not in self.seen
            ):  # neither view nor in place
                self.seen.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self.alive -= nbytes


class StepProbe:
    """Called after each step: the memory of what comes before the first, the operations of the second, the memory of
    the third, the seconds of those from the fifth on. Calls `pause` before it returns."""

    def __init__(self, device: str = "cpu", pause: Callable[[], None] = lambda: None):
        self.device, self.pause, self.meter, self.counter = device, pause, MemoryMeter(device), operation_counter()
        self.seconds: list[float] = []
        self.tables: list[Tensor] = []
        self.steps = 0
        self.meter.start()

    def __call__(self, iteration: int, synthetic=None) -> None:
        end = now(self.device)
        self.steps += 1
        if self.steps == 1:
            self.setup_bytes = self.meter.stop()
            if synthetic is not None:
                self.tables = [synthetic.f, synthetic.text]
        elif self.steps == 2:
            self.counter.__exit__(None, None, None)
            self.operations = self.counter.get_total_flops()
        elif self.steps == 3:
            self.step_bytes = self.meter.stop()
        elif self.steps > 4:
            self.seconds.append(end - self.last)
        self.pause()
        if self.steps == 1:
            self.counter.__enter__()
        elif self.steps == 2:
            self.meter.start()
        self.last = now(self.device)
