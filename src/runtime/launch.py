"""How this process was started (torchrun, SLURM or neither), and signals that ask it to stop."""

import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from src.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process is `rank` of `world_size` in the job, and `local_rank` on its machine; the
    processes meet at `address` and `port`. `launcher`: torchrun, slurm or none."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    launcher: str = "none"

    def __post_init__(self) -> None:
        """Errors: ValueError for values that no launcher gives."""
        ranks = 0 <= self.rank < self.world_size and 0 <= self.local_rank < self.world_size
        if not (ranks and 0 < self.port < 65_536 and re.fullmatch(r"[\w.:%-]+", self.address)):
            raise ValueError(str(self))


def detect_launch(environ: Mapping[str, str], local_rank: int | None = None) -> Launch:
    """Read the launcher's environment variables. Without a launcher there is one process, on any
    number of GPUs, and in a SLURM batch script without srun. `local_rank`: the option of that name,
    which launchers before torchrun passed."""
    try:
        if ("RANK" in environ) != ("WORLD_SIZE" in environ):
            raise ValueError("RANK and WORLD_SIZE must be set together, or not at all")
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return Launch(
                rank=int(environ["RANK"]),
                local_rank=int(environ.get("LOCAL_RANK", local_rank or 0)),
                world_size=int(environ["WORLD_SIZE"]),
                address=environ.get("MASTER_ADDR", "127.0.0.1"),
                port=int(environ.get("MASTER_PORT", 29500)),
                launcher="torchrun",
            )
        # Only srun sets this one; a batch script has SLURM_NTASKS too, but runs once.
        tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
        if tasks > 1 and "SLURM_PROCID" in environ:
            # All processes need the same port: derived from the job's number.
            port = 15000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000
            return Launch(
                rank=int(environ["SLURM_PROCID"]),
                local_rank=0 if _sees_own_gpus(environ) else int(environ.get("SLURM_LOCALID", 0)),
                world_size=tasks,
                address=environ.get("MASTER_ADDR") or _first_host(environ),
                port=int(environ.get("MASTER_PORT", port)),
                launcher="slurm",
            )
    except ValueError as error:
        raise InputError(f"invalid launcher environment variables: {error}") from None
    return Launch()


def _sees_own_gpus(environ: Mapping[str, str]) -> bool:
    """Whether SLURM shows each task its own GPUs only, which it then numbers from 0."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    n_visible = len(visible.split(",")) if visible else None
    step_gpus = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS") or ""
    on_node = environ.get("SLURM_GPUS_ON_NODE") or len(step_gpus.split(","))
    binding = environ.get("SLURM_GPU_BIND", "")
    if "none" in binding or (n_visible is not None and n_visible == int(on_node) > 1):
        return False  # every task sees every GPU of the machine, whatever was asked for
    return (
        "SLURM_GPUS_PER_TASK" in environ
        or "SLURM_NTASKS_PER_GPU" in environ
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or any(kind in binding for kind in ("single", "per_task", "map_gpu"))
        or n_visible == 1 < int(on_node)
    )


def _first_host(environ: Mapping[str, str]) -> str:
    """The first machine of the job step; `scontrol` expands lists such as node[01-04,07]."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if "[" not in nodes:
        return nodes.split(",")[0] or "127.0.0.1"
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise InputError(
            f"SLURM's list of machines {nodes} cannot be expanded with scontrol; "
            "set MASTER_ADDR to the first machine's name"
        ) from None


class StopRequest:
    """Set by SIGTERM or SIGUSR1 (pre-emption, the end of the time limit): the handler only sets a
    flag, and the loop saves and leaves when it can.

    A second signal ends the process at once, unless it comes within `PATIENCE` seconds: launchers
    forward to their processes signals that these already got from SLURM.
    """

    PATIENCE = 2.0

    def __init__(self) -> None:
        self.requested = False
        self._number, self._since = int(signal.SIGTERM), 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested, self._number, self._since = True, number, time.monotonic()
        elif time.monotonic() - self._since > self.PATIENCE:
            os._exit(128 + number)

    def finish(self) -> None:
        """Ignore signals from now on: the work is done. (While Python exits, a signal would make a
        failure of a complete job.)"""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def leave(
        self,
        log: logging.Logger,
        where: str,
        is_main: bool,
        meet: Callable[[], None] = lambda: None,
    ) -> NoReturn:
        """End this process, whose work is saved but not done: one line, and the exit status of a
        process ended by the signal. In a SLURM job the main process first requeues the job.

        Args:
            where: how far the work is, for the line.
            meet: waits for the other processes: a launcher ends all when one has left, even if the
                main one is still waiting for SLURM.
        """
        self.finish()  # a requeued job gets SIGTERM at once, as do the commands it calls
        log.info("stopped by a signal %s; the same command resumes", where)
        if is_main:
            requeue(os.environ, log)
        meet()
        sys.exit(128 + self._number)


def requeue(environ: Mapping[str, str], log: logging.Logger) -> None:
    """Requeue the SLURM job that we run in, if any, unless it is being cancelled. (SLURM counts a
    pre-empted job that ends by itself as completed, and would not run it again.)"""
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_TASK_ID" in environ:
        # The last task of an array has the array's own number, by which SLURM means all tasks.
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    state = _ask_slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    if state.stdout.strip() not in ("RUNNING", "PREEMPTED"):
        log.info("SLURM job %s is %s: not requeued", job, state.stdout.strip() or state.stderr)
        return
    done = _ask_slurm("scontrol", "requeue", job)
    failed = done.returncode != 0
    text = f"SLURM job {job} cannot be requeued: {done.stderr.strip()}"
    log.info("%s", text if failed else f"requeued SLURM job {job}")


def _ask_slurm(*command: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=str(error))
