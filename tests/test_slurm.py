"""The launcher is read from the environment; without one there is a single process."""

import pytest

from src.runtime.errors import InputError
from src.runtime.launch import Launch, detect_launch


def test_no_launcher_is_one_process_whatever_the_machine_has():
    assert detect_launch({}) == Launch(rank=0, local_rank=0, world_size=1, launcher="none")


def test_torchrun():
    environ = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1234",
        "SLURM_STEP_NUM_TASKS": "2",  # torchrun started by srun: torchrun's word counts
        "SLURM_PROCID": "1",
    }
    assert detect_launch(environ) == Launch(5, 1, 8, "n1", 1234, "torchrun")


def test_the_old_launcher_passes_local_rank_as_an_option():
    environ = {"RANK": "1", "WORLD_SIZE": "2"}
    assert detect_launch(environ, local_rank=1).local_rank == 1
    assert detect_launch({**environ, "LOCAL_RANK": "0"}, local_rank=1).local_rank == 0


def test_srun():
    environ = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu7,gpu9",
        "SLURM_JOB_ID": "4000123",
    }
    launch = detect_launch(environ)
    assert (launch.rank, launch.local_rank, launch.world_size) == (3, 1, 4)
    assert (launch.address, launch.launcher) == ("gpu7", "slurm")
    other = detect_launch({**environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert (other.address, other.port) == (launch.address, launch.port)
    assert 1024 < launch.port < 65536
    own_gpus = detect_launch({**environ, "SLURM_GPUS_PER_TASK": "1"})
    assert (own_gpus.rank, own_gpus.local_rank) == (3, 0)  # it sees no others


def test_a_batch_script_without_srun_is_one_process():
    environ = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    assert detect_launch(environ).world_size == 1


def test_nonsense_is_bad_input():
    with pytest.raises(InputError, match="environment"):
        detect_launch({"RANK": "zero", "WORLD_SIZE": "2"})
