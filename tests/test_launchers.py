"""Who a process is, when something other than DeepSpeed's launcher has started it."""

import os

import pytest

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.runtime import adopt_launcher

SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture
def started(monkeypatch):
    """Sets the variables of a launcher, and tells what the process then takes itself for."""

    def become(**variables: str) -> dict[str, str | None]:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *SRUN, *MPIRUN, *MEETING, "PMI_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        adopt_launcher()
        return {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}

    return become


def test_ranks_of_srun_and_mpirun_are_taken(started):
    assert started(**SRUN, **MEETING) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert started(**MPIRUN, **MEETING) == {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


def test_several_processes_without_a_meeting_place_are_refused(started):
    with pytest.raises(InputError, match=r"started 8 times by srun: set MASTER_ADDR .* or start it with deepspeed"):
        started(**SRUN)
    with pytest.raises(InputError, match="started 2 times by mpirun"):
        started(**MPIRUN, MASTER_ADDR="node1")


def test_one_task_and_a_launcher_that_sets_ranks_are_left_alone(started):
    assert started(**SRUN | {"SLURM_STEP_NUM_TASKS": "1"})["RANK"] is None
    known = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}
    assert started(**SRUN, **known, **MEETING) == known


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT is not: start it with deepspeed"),
        ({"RANK": "0", "WORLD_SIZE": "x", **MEETING}, "WORLD_SIZE=x in the environment: expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK must be below WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING, "MASTER_PORT": "99999999"}, "MASTER_PORT at most 65535"),
        ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS=all"),
        ({"LOCAL_SIZE": "x"}, "LOCAL_SIZE=x in the environment"),
    ],
)
def test_variables_that_no_launcher_sets_so(variables, words, started):
    with pytest.raises(InputError, match=words):
        started(**variables)
