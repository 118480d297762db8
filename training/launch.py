"""Devices, processes, precision and signals: what a run finds on its machine, through Accelerate."""

import os
import random
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor

from .files import Refused, sha256_json

warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # what takes its place is new

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and by accelerate launch
# What `accelerate launch` may be told that no process would then have all weights by, to keep or to measure.
SPREAD = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the run to end; what was to be kept is on disk. Exit status 128 + signal.

    No Exception, as KeyboardInterrupt is none: whoever catches those of a library does not mean this one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.number = number


class StopSignals:
    """Turns signals and the launcher's death into a request that the loop answers between two steps.

    SIGTERM and SIGINT; SIGUSR1 and SIGUSR2, which SLURM is told to send before it preempts; and SIGHUP, when a terminal
    closes, unless it was ignored before, as nohup has it.

    Outside the loop (`deferred` false) the handler raises `Interrupted` at once: every file is whole or not there.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferred = False
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None

    def __enter__(self) -> "StopSignals":
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [n for n in STOPS if n != signal.SIGHUP or not nohup]
        self._old = {n: signal.signal(n, self._handle) for n in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self.deferred:
            raise Interrupted(number)

    def requested(self) -> bool:
        """Whether to stop. `accelerate launch` dies of a SIGTERM and leaves us behind: that asks us to stop, too."""
        if self._parent is not None and os.getppid() != self._parent:
            self.number = self.number or signal.SIGTERM
        return self.number is not None


@dataclass(frozen=True)
class Key:
    """What randomness is a function of, beside the step: never a state to be saved."""

    seed: int
    phase: str
    round: int = 0

    @property
    def name(self) -> str:
        """The key's phase and round, as checkpoints are named."""
        return f"{self.phase}_{self.round}"

    def number(self, *more: int | str) -> int:
        """63 random bits that belong to this key and `more`."""
        return int(sha256_json([self.seed, self.phase, self.round, *more])[:16], 16) >> 1


def seed_all(number: int) -> None:
    """Seed torch, numpy and random, for library code that draws from their global streams."""
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  global state is what library code reads
    torch.manual_seed(number)


def launched_precision() -> str:
    """What `accelerate launch` was told, on its command line or in its file; "fp32" without either, too."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return "fp32" if told == "no" else told


def resolve_precision(precision: str, cpu_bf16: bool) -> str:
    """`auto` as what the launcher was told, or the device has units for: bf16, else fp16 on CUDA, else fp32.

    Args:
        precision: what was asked for.
        cpu_bf16: the network is right, and faster, in bf16 on a CPU that has units for it.
    """
    if precision != "auto":
        return precision
    if launched_precision() in ("bf16", "fp16"):
        return launched_precision()
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if torch.backends.mps.is_available():
        return "fp32"
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_units and cpu_bf16 else "fp32"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on whatever device."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(precision: str, tracker: str | None, folder: str) -> Accelerator:
    """An Accelerator for the processes that were launched, with every core in use.

    Raises:
        Refused: several processes were launched that cannot find each other, or would share the network out; fp16 on a
            CPU; a tracker that is missing.
    """
    no_device = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if precision == "fp16" and no_device:
        raise Refused("precision: fp16 needs a GPU; choose auto, fp32 or bf16.")
    for name, asked in SPREAD.items():
        if os.environ.get(asked, "").lower() in ("1", "true"):
            raise Refused(
                f"the launcher was told to use {name}, which spreads a network over processes; this training keeps it "
                "whole in each, so launch it with --multi_gpu instead, or by torchrun."
            )
    if tracker and tracker not in {kind.value for kind in get_available_trackers()}:
        raise Refused(f"log.tracker: {tracker} is not installed; install its package, or leave log.tracker out.")
    AcceleratorState._reset_state()  # one for all of a process, precision included; the processes' group stays
    accelerator = Accelerator(
        cpu=no_device,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        dynamo_backend="no",  # compiling gains nothing here (0.95 of the speed on a CPU)
        log_with=tracker,
        project_dir=folder,
        # Of our own: else the launcher's would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            # The main process alone fits probes and writes; the others wait for it longer than NCCL's 10 minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
            # Pseudo-labels and banks are buffers, too large to send at each step; the loop unites buffers.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    # fp32 is fp32, so that figures are those of any device; and a run goes on bit for bit as if it had not stopped.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and accelerator.num_processes == 1:
        raise Refused(
            f"{world} processes were launched but each believes to be alone; start them with "
            f"`torchrun --nproc_per_node {world} -m -- training`."
        )
    if launched_precision() not in ("fp32", precision):
        asked = launched_precision()
        accelerator.print(
            f"warning: {precision} is used, not {asked} as the launcher was told; --precision says which."
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        accelerator.print("warning: nothing is compiled, though the launcher's dynamo_backend asks for it.")
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        accelerator.print("warning: the launcher's gradient_accumulation_steps is not used; accumulate says how many.")
    if accelerator.device.type == "cpu":
        # Launchers leave one thread to each process where the user said nothing; a number of the user's own is kept.
        launched = any(name in os.environ for name in LAUNCHERS)
        said = os.environ.get("OMP_NUM_THREADS")
        if said is None or (launched and said == "1"):
            local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
            torch.set_num_threads(max(1, cores() // local))
    return accelerator


class _Gather(torch.autograd.Function):
    """All processes' rows; backward, the sum of all processes' gradients of one's own rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        context.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[torch.distributed.get_rank() * context.count :][: context.count]


def gather_rows(rows: Tensor) -> Tensor:
    """[n, ...] of every process as one, in their order, with gradients to each one's own; as many rows in each.

    A loss over all of them, averaged over the processes as DDP averages gradients, has the gradient of the whole batch.
    """
    alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    return rows if alone else _Gather.apply(rows)


def first_row(count: int) -> int:
    """Where this process's `count` rows begin among those that `gather_rows` returns."""
    return count * torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def end_trackers(accelerator: Accelerator) -> None:
    """End a training's trackers, not the group of processes, which the next training of a comparison needs."""
    for tracker in accelerator.trackers:
        tracker.finish()


def end_processes() -> None:
    """Part from the other processes, if there are any: at the interpreter's exit, threads of Gloo's would abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
