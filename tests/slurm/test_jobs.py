"""The job files of examples/slurm under a real SLURM: stopped in the middle, they end as if not.

Needs SLURM's own programs (`apt-get install --no-install-recommends slurmctld slurmd slurm-client
munge`); without them these tests are skipped. The job files are submitted as they are: options of
sbatch take the place of their partitions and numbers, and options of the scripts that of theirs.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import REFERENCE, ROOT
from tests.slurm.cluster import PACKAGES, Cluster, missing, wait_for

JOBS = ROOT / "examples" / "slurm"
TOTAL_STEPS = 200
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

pytestmark = pytest.mark.skipif(
    bool(missing()),
    reason=f"needs SLURM ({', '.join(missing())} not found): as root, "
    f"apt-get install --no-install-recommends {PACKAGES}",
)


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[Cluster]:
    """One SLURM for all tests of this file."""
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    except TimeoutError:
        print(cluster.logs())
        raise
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running_cluster, tmp_path) -> Iterator[Cluster]:
    """The same without the jobs of another test. What is printed here, pytest shows of tests that
    failed: the logs of jobs and daemons."""
    yield running_cluster
    running_cluster.clear()
    for log in sorted(tmp_path.rglob("*.log")):
        print(f"--- {log.relative_to(tmp_path)}", log.read_text(errors="replace"), sep="\n")
    print(running_cluster.logs())


def finish(cluster: Cluster, job: str, seconds: float = 150.0) -> str:
    """Wait until the job has ended for good; returns its state."""

    def ended() -> str | None:
        state = cluster.state(job)
        return state if state in ENDED else None

    return wait_for(f"the end of job {job}", ended, seconds)


# --- training: two processes


def train(
    cluster: Cluster, file: str, folder: Path, *sbatch: str, more: tuple[str, ...] = ()
) -> str:
    """Submit a training with that job file, and `more` options; returns the job's number."""
    folder.mkdir()
    return cluster.submit(
        "--partition=low", "--gpus-per-node=2", "--cpus-per-task=1", *sbatch,
        f"--output={folder}/job.log", JOBS / file,
        "--train_data", REFERENCE / "data.json", "--eval_data", REFERENCE / "data.json",
        "--model_path", REFERENCE / "t5", "--n_context", "2", "--text_maxlength", "48",
        "--per_gpu_batch_size", "1", "--accumulation_steps", "2", "--lr", "1e-3",
        "--generation_max_length", "5", "--eval_freq", "50", "--save_freq", "50",
        "--total_steps", str(TOTAL_STEPS), "--checkpoint_dir", folder, "--name", "run",
        *more, cwd=ROOT,
    )  # fmt: skip


def updates(folder: Path) -> int:
    """How many updates a training has reported so far."""
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_the_middle(folder: Path) -> None:
    wait_for(f"updates in {folder}", lambda: updates(folder) > 0, 120)
    assert updates(folder) < TOTAL_STEPS / 2, "the training is too fast to be stopped in its middle"


def stopped_after(folder: Path) -> int:
    """The update after which the log says that the run was stopped, once."""
    log = (folder / "run" / "run.log").read_text()
    (step,) = re.findall(r"stopped by a signal after update (\d+)", log)
    return int(step)


def assert_went_on(cluster: Cluster, job: str, folder: Path) -> None:
    """The job was stopped in its middle, queued again once, and began where it had stopped."""
    assert finish(cluster, job) == "COMPLETED"
    assert cluster.show(job)["Restarts"] == "1"
    step = stopped_after(folder)
    assert 0 < step < TOTAL_STEPS
    assert re.search(rf"resuming from .*/step-{step}\n", (folder / "run" / "run.log").read_text())


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights to the bit, same metrics line by line."""
    for name in (f"step-{TOTAL_STEPS}", "best_dev"):
        weights = [
            load_file(folder / "run" / "checkpoint" / name / "model.safetensors")
            for folder in (one, other)
        ]
        assert weights[0].keys() == weights[1].keys()
        for key, tensor in weights[0].items():
            assert tensor.equal(weights[1][key]), f"{name}: {key}"
    lines = [(folder / "run" / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    assert lines[0] == lines[1]


def train_undisturbed(cluster: Cluster, folder: Path, *more: str) -> Path:
    """The folder of a training of two processes on two nodes that nothing disturbed."""
    nodes = ["--nodes=2", "--ntasks-per-node=1"]
    job = train(cluster, "train_several_nodes.sbatch", folder, *nodes, more=more)
    assert finish(cluster, job) == "COMPLETED", (folder / "job.log").read_text()
    assert "; 2 processes" in (folder / "run" / "run.log").read_text()
    assert cluster.show(job)["Restarts"] == "0"
    return folder


@pytest.fixture(scope="module")
def undisturbed(running_cluster, tmp_path_factory) -> Path:
    return train_undisturbed(running_cluster, tmp_path_factory.mktemp("undisturbed") / "job")


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_preempted_by_another_job(more, cluster, undisturbed, tmp_path):
    """The job of another partition gets the nodes; ours saves, is queued again, and goes on."""
    whole = train_undisturbed(cluster, tmp_path / "whole", *more) if more else undisturbed
    folder = tmp_path / "job"
    nodes = ["--nodes=2", "--ntasks-per-node=1"]
    job = train(cluster, "train_preemptible.sbatch", folder, *nodes, more=more)
    wait_for_the_middle(folder)
    other = cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/other.log",
        "--wrap", "true",
    )  # fmt: skip
    assert finish(cluster, other) == "COMPLETED"
    assert_went_on(cluster, job, folder)
    assert_same_run(whole, folder)


def test_asked_to_stop_by_usr1(cluster, undisturbed, tmp_path):
    """What `--signal=USR1@120` sends at the end of the time limit, sent by hand."""
    folder = tmp_path / "job"
    nodes = ["--nodes=2", "--ntasks-per-node=1"]
    job = train(cluster, "train_preemptible.sbatch", folder, *nodes)
    wait_for_the_middle(folder)
    cluster.command("scancel", "--signal=USR1", job)
    assert_went_on(cluster, job, folder)
    assert_same_run(undisturbed, folder)


@pytest.mark.fast
def test_cancelled_by_the_user(cluster, tmp_path):
    """It saves, too, but stays away."""
    folder = tmp_path / "job"
    nodes = ["--nodes=1", "--ntasks-per-node=2"]
    job = train(cluster, "train_one_node.sbatch", folder, *nodes)
    wait_for_the_middle(folder)
    cluster.command("scancel", job)
    assert finish(cluster, job) == "CANCELLED"
    assert cluster.show(job)["Restarts"] == "0"
    step = stopped_after(folder)
    checkpoint = folder / "run" / "checkpoint" / f"step-{step}" / "checkpoint.json"
    assert json.loads(checkpoint.read_text())["step"] == step


def test_a_published_figure(cluster, tmp_path):
    """Trained, asked to stop in the middle, queued again, tested, and compared: one process a task
    for training and testing, one for the whole job otherwise."""
    (tmp_path / "DPR").mkdir()
    for part in ("train", "dev", "test"):
        (tmp_path / "DPR" / f"{part}.json").write_text((REFERENCE / "data.json").read_text())
    values = {"DATA": tmp_path, "OUT": tmp_path / "out", "T5_BASE": REFERENCE / "t5", "N": 2}
    values |= {"BASE_STEPS": TOTAL_STEPS, "ACCUMULATE": 2}
    job = cluster.submit(
        "--partition=low", "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2",
        "--cpus-per-task=1", f"--output={tmp_path}/job.log",
        "--export=ALL," + ",".join(f"{name}={value}" for name, value in values.items()),
        JOBS.parent / "reproduce" / "job.sbatch", "dpr_base", cwd=ROOT,
    )  # fmt: skip
    trained = tmp_path / "out" / "dpr_base" / "reader"
    wait_for("an update", lambda: read_text(trained / "metrics.jsonl"), 120)
    cluster.command("scancel", "--signal=USR1", job)
    assert finish(cluster, job) == "FAILED"  # because the figure was not reproduced
    assert cluster.show(job)["ExitCode"] == "3:0"
    assert cluster.show(job)["Restarts"] == "1"
    log = (tmp_path / "job.log").read_text()
    line = r"dpr_base: exact match, expected 48\.2 ± 1\.0, got \S+ on 24 questions: NOT reproduced"
    assert len(re.findall(line, log)) == 1
    assert "resuming from" in (trained / "run.log").read_text()
    assert (trained / "run.log").read_text().count("; 2 processes") == 2


def read_text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


# --- embedding: an array with a shard a job


def write_passages(file: Path, n: int) -> None:
    """A collection large enough to be stopped in, made of the reference's passages."""
    header, *lines = (REFERENCE / "passages.tsv").read_text().splitlines()
    rows = (lines[i % len(lines)].split("\t", 1)[1] for i in range(n))
    file.write_text("\n".join([header, *(f"{i}\t{row}" for i, row in enumerate(rows))]) + "\n")


def embed(cluster: Cluster, folder: Path, array: str, shards: int = 2) -> str:
    """Submit an array of shards of a folder's `passages.tsv`; returns the array's number."""
    return cluster.submit(
        "--partition=low", "--cpus-per-task=1", f"--array={array}",
        f"--output={folder}/%a.log", JOBS / "embed_array.sbatch",
        "--model_path", REFERENCE / "legacy_retriever_mask_mean",
        "--tokenizer", REFERENCE / "bert", "--passages", folder / "passages.tsv",
        "--num_shards", str(shards), "--output_path", folder / "x",
        cwd=ROOT,
    )  # fmt: skip


def test_an_array_of_shards(cluster, tmp_path):
    """One of two shards is killed and made again; the other is asked to stop, queues itself again
    and goes on. (It is the last of its array, which has the array's own number as its job's.)"""

    for name in ("undisturbed", "disturbed"):  # each has a new collection, which two jobs open
        (tmp_path / name).mkdir()
        write_passages(tmp_path / name / "passages.tsv", 2 * 5 * 2048)
    job = embed(cluster, tmp_path / "undisturbed", "0-1")
    assert [finish(cluster, f"{job}_{task}") for task in (0, 1)] == ["COMPLETED"] * 2

    job = embed(cluster, tmp_path / "disturbed", "0-1")
    # (A signal to the step, the `.0`: SIGKILL to the whole would cancel it, and that saves.)
    disturbances = {0: ("--signal=KILL", f"{job}_0.0"), 1: ("--signal=USR1", f"{job}_1")}

    def disturb_what_has_begun() -> bool:
        for shard in list(disturbances):
            if (tmp_path / "disturbed" / f".x_{shard:02d}.progress.json").exists():
                cluster.command("scancel", *disturbances.pop(shard))
        return not disturbances

    wait_for("a block of each shard", disturb_what_has_begun, 120)
    assert finish(cluster, f"{job}_0") == "FAILED"
    again = embed(cluster, tmp_path / "disturbed", "0")
    assert finish(cluster, f"{again}_0") == "COMPLETED"
    assert finish(cluster, f"{job}_1") == "COMPLETED"
    assert cluster.show(f"{job}_1")["JobId"] == job
    assert [cluster.show(f"{job}_{task}")["Restarts"] for task in (0, 1)] == ["0", "1"]
    for task in (0, 1):
        assert "resuming after" in (tmp_path / "disturbed" / f"{task}.log").read_text()
        ours, theirs = (tmp_path / name / f"x_{task:02d}" for name in ("disturbed", "undisturbed"))
        assert ours.read_bytes() == theirs.read_bytes()


def runs_python(folder: Path) -> bool:
    """Whether Python has been started with a path in the folder among its arguments."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            program, *arguments = file.read_text(errors="replace").split("\0")
            if Path(program).name.startswith("python") and f"{folder}/x" in arguments:
                return True
    return False


def test_a_signal_while_python_is_starting(cluster, tmp_path):
    """Nothing listens to signals yet: the job file itself puts the job back into the queue."""
    write_passages(tmp_path / "passages.tsv", 10)
    job = embed(cluster, tmp_path, "0", shards=1)
    wait_for("the job's Python", lambda: runs_python(tmp_path))  # SLURM lists a step before it runs
    cluster.command("scancel", "--signal=USR1", f"{job}_0")
    assert finish(cluster, f"{job}_0") == "COMPLETED"
    assert cluster.show(f"{job}_0")["Restarts"] == "1"
    assert (tmp_path / "x_00").exists()
