"""A real SLURM on this machine, for as long as the tests last.

Debian's own programs (slurmctld, slurmd, munged) run as whoever runs the tests, in the foreground
of this process, on the loopback interface, with ports of their own and everything they write in
one short temporary folder. Two emulated nodes with two GPUs each in SLURM's books (not in the
machine) stand in two partitions: jobs of `high` pre-empt those of `low`.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge"
# Daemons lie in sbin, which ordinary users do not have in their PATH.
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
NODES = ("127.0.0.1", "127.0.0.2")
TASK_CPUS, GPUS = 8, 2  # in SLURM's books, for each node
GRACE_TIME = 20  # seconds between SIGTERM and SIGKILL for a job that is pre-empted

CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start once the credentials of its first run have expired: soon.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
# As at many sites: when one task fails, the others are ended.
KillOnBadExit=1
MailProg=/bin/true
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that a cluster needs and this machine has not."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


def wait_for(what: str, check: Callable[[], Value], seconds: float = 60.0) -> Value:
    """Ask again and again until the answer is true; returns it. `TimeoutError` names `what`."""
    end = time.monotonic() + seconds
    while not (answer := check()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
    return answer


class Cluster:
    """SLURM from `start` to `stop`; jobs between them.

    `environment` is what SLURM's commands, and so the jobs, run in.
    """

    def __init__(self) -> None:
        # A Unix socket's path holds about 100 characters: pytest's own folders can be too long.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        # What the test session itself was started with is nobody's business in a job: neither
        # another SLURM's settings nor a launcher's.
        foreign = ("SLURM", "SBATCH_", "SRUN_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "VIRTUAL_ENV": sys.prefix,  # the job files look for an active environment
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._daemons: list[subprocess.Popen] = []

    # --- the daemons

    def start(self) -> None:
        """Bring up munge, the controller and the nodes, and wait until jobs can run."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={TASK_CPUS} RealMemory=1000000 Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        # SLURM only counts GPUs, but wants a device file for each: any will do.
        gpus = "AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
        (self.folder / "gres.conf").write_text(gpus)
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller_port=controller_port,
                user=self.command("id", "-un").strip(),
                folder=self.folder,
                nodes=nodes,
                grace=GRACE_TIME,
            )
        )
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        socket_file = self.folder / "munge.socket"
        self._daemon(  # (--force: the folder is nobody else's, which munged would complain about)
            "munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        wait_for("munge's socket", lambda: self._alive() and socket_file.exists())
        self._daemon("slurmctld", "-D", "-f", self.folder / "slurm.conf")
        for node in NODES:
            self._daemon("slurmd", "-D", "-f", self.folder / "slurm.conf", "-N", node)
        wait_for("two idle nodes", lambda: self._idle_nodes() == len(NODES))

    def _daemon(self, *command: str | Path) -> None:
        with open(self.folder / f"{command[0]}{len(self._daemons)}.log", "wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    # If the tests are killed, the daemons are told to end, too.
                    ["setpriv", "--pdeathsig", "TERM", *map(str, command)],
                    env=self.environment,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the tests reaches them through stop()
                )
            )

    def _alive(self) -> bool:
        """True, or an error: a daemon that has ended explains itself in its log."""
        for daemon in self._daemons:
            assert daemon.poll() is None, f"{daemon.args[3]} has ended:\n{self.logs()}"
        return True

    def _idle_nodes(self) -> int:
        self._alive()
        states = self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False)
        return states.split().count("idle")

    def stop(self) -> None:
        """End all jobs and daemons, and remove the folder; also after half a start."""
        try:
            if len(self._daemons) > 1:
                self.clear()
        finally:
            for daemon in reversed(self._daemons):  # the nodes, the controller, munge
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- jobs

    def command(
        self,
        *command: str | Path,
        check: bool = True,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Run one of SLURM's commands; returns what it printed."""
        done = subprocess.run(
            list(map(str, command)),
            env=environment or self.environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """`sbatch`, from the folder `cwd`; returns the job's number. The job asks `squeue` of a
        controller that is as busy as those of large sites: it answers late."""
        slow = self.folder / "slow"
        slow.mkdir(exist_ok=True)
        squeue = shutil.which("squeue", path=PATH)
        (slow / "squeue").write_text(f'#!/bin/sh\nsleep 3\nexec {squeue} "$@"\n')
        (slow / "squeue").chmod(0o700)
        environment = {**self.environment, "PATH": f"{slow}:{self.environment['PATH']}"}
        printed = self.command("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment)
        return printed.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job (of an array, of its first task)."""
        fields: dict[str, str] = {}
        for pair in self.command("scontrol", "-o", "show", "job", job).split("\n")[0].split():
            name, _, value = pair.partition("=")
            fields.setdefault(name, value)
        return fields

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def clear(self) -> None:
        """Cancel every job and wait until the nodes are free again."""
        self.command("scancel", "--full", f"--user={os.getuid()}", check=False)
        wait_for("no job left", lambda: not self.command("squeue", "-h", check=False).strip(), 40)

    def logs(self) -> str:
        """The ends of all logs in the cluster's folder, for the message of a test that failed."""
        parts = []
        for file in sorted(self.folder.glob("*.log")):
            lines = file.read_text(errors="replace").splitlines()[-60:]
            parts += [f"--- {file.name}", *lines]
        return "\n".join(parts)


def _free_ports(n: int) -> list[int]:
    """Ports that nothing listens on now. All are held before the first is given back."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
