"""How processes find each other, and share the rows of a batch."""

import itertools
import socket

import numpy as np
import pytest

from bitgen import data
from bitgen.errors import UserError
from bitgen.runtime import distributed
from bitgen.runtime.distributed import find_processes

PLAIN = {"COORDINATOR_ADDRESS": "10.0.0.1:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
TORCHRUN = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, None),
        (PLAIN, {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}),
        ({**PLAIN, "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, None),
        (TORCHRUN, {"coordinator_address": "node1:29500", "num_processes": 2, "process_id": 1}),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (
            {**TORCHRUN, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            {
                "coordinator_address": "node1:29501",
                "num_processes": 2,
                "process_id": 1,
                "local_device_ids": [1],
            },
        ),
        (SLURM, {}),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # no srun
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, {}),
    ],
)
def test_the_environment_tells_of_the_other_processes(env, found):
    assert find_processes(env) == found


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PROCESS_ID": "0", "NUM_PROCESSES": "2"}, "^COORDINATOR_ADDRESS missing: .*PROCESS_ID=0"),
        ({k: v for k, v in TORCHRUN.items() if k != "RANK"}, "^RANK missing: .* WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "^MASTER_ADDR and MASTER_PORT and RANK missing"),
        ({**PLAIN, "PROCESS_ID": "4"}, "PROCESS_ID=4: processes count from 0"),
        ({**PLAIN, "NUM_PROCESSES": "two"}, "NUM_PROCESSES='two' is not a number"),
        ({**PLAIN, "COORDINATOR_ADDRESS": "node1"}, "no port: set host:port"),
    ],
)
def test_a_partly_set_environment_names_what_is_missing(env, message):
    with pytest.raises(UserError, match=message):
        find_processes(env)


def test_a_coordinator_that_does_not_answer_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # taken, but nothing listens
        address = f"127.0.0.1:{s.getsockname()[1]}"
        env = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
        with pytest.raises(UserError, match=rf"no coordinator answers at {address} after 0 s"):
            distributed.start({**env, "COORDINATOR_TIMEOUT": "0"})


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_processes_read_disjoint_rows_and_together_all(processes, training):
    c = data.default_config()
    c.image_size, c.threads = 8, 1
    parts = []
    for index in range(processes):
        batches = data.make_batches(
            c,
            batch_size=8,
            seed=3,
            training=training,
            process_index=index,
            process_count=processes,
        )
        parts.append([batch["image"] for batch in itertools.islice(batches, 3)])
        batches.close()
    whole = data.make_batches(c, batch_size=8, seed=3, training=training)
    for i, batch in enumerate(itertools.islice(whole, 3)):
        together = np.concatenate([part[i] for part in parts])
        np.testing.assert_array_equal(together, batch["image"])
    whole.close()
