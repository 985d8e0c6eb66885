"""Runs of several processes: how they start, agree and exchange arrays.

Each process drives the devices of its host, or one of them, and holds its rows of every batch.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bitgen.errors import UserError, first_line
from bitgen.runtime.mesh import BATCH, shards_of_batch

T = TypeVar("T")

_PLAIN = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")

_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")

# Set by srun and read by JAX itself.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

_PATIENCE = 300  # seconds for all processes to start

# Timeout of JAX's own heartbeats in seconds. `runtime.watchdog` acts sooner, says more, and ignores
# the time in which a machine was suspended.
_HEARTBEATS = 900

_FOREVER = 1000 * 24 * 3600  # milliseconds; the watchdog ends what is stuck

# Exit status of a fault that a restart can mend: EX_TEMPFAIL of sysexits.h.
RESTART = 75


# ---------------------------------------------------------------------------------- starting
def start(env: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of a run, if the environment describes any.

    Call it before JAX initialises its devices. Raises UserError for variables that are missing or
    wrong, and if the others do not answer within `COORDINATOR_TIMEOUT` seconds (default 300).
    """
    found = find_processes(env)
    if found is None or jax.distributed.is_initialized():
        return
    patience = _number(env, "COORDINATOR_TIMEOUT") if "COORDINATOR_TIMEOUT" in env else _PATIENCE
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `runtime.stop` does it
    address, index = found.get("coordinator_address"), found.get("process_id")
    if address is not None and index:  # JAX would end the process with a C++ stack
        _wait_for(address, patience)
    failed = (
        f"not all processes of this run started within {patience} s; start all of them, with one "
        f"address that all hosts reach{f', now {address}' if address else ''}"
    )
    with on_abort(lambda: (failed, 2)):
        try:
            jax.distributed.initialize(
                **found, initialization_timeout=patience, heartbeat_timeout_seconds=_HEARTBEATS
            )
        except (RuntimeError, ValueError, OSError) as e:
            raise UserError(f"{failed} ({first_line(e)})") from None


def find_processes(env: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`, or None for a single process.

    They come from COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID, or from torchrun's variables.
    They are empty where JAX detects the processes itself: under srun and on TPU pods. Raises
    UserError if only some variables of a set are present.
    """
    if given := _complete(env, _PLAIN):
        address, count, index = given
        if ":" not in address:
            raise UserError(f"COORDINATOR_ADDRESS={address} has no port: set host:port")
        return _arguments(address, {"NUM_PROCESSES": count, "PROCESS_ID": index})
    if given := _complete(env, _TORCHRUN):
        host, port, count, index = given
        # torchrun itself listens on the port.
        port = str(int(port) + 1) if "TORCHELASTIC_RUN_ID" in env and port.isdigit() else port
        found = _arguments(f"{host}:{port}", {"WORLD_SIZE": count, "RANK": index})
        if found and int(env.get("LOCAL_WORLD_SIZE") or 1) > 1:
            found["local_device_ids"] = [_number(env, "LOCAL_RANK")]
        return found
    if all(env.get(name) for name in _SLURM) and int(env["SLURM_NTASKS"]) > 1:
        tasks, devices = env.get("SLURM_STEP_TASKS_PER_NODE", ""), env.get("SLURM_GPUS_ON_NODE", "")
        if tasks.split("(")[0] == "1" and devices.isdigit():
            return {"local_device_ids": list(range(int(devices)))}  # JAX would take one of them
        return {}
    return {} if _on_tpu_pod(env) else None


def _complete(env: Mapping[str, str], names: tuple[str, ...]) -> list[str] | None:
    """Returns the values of all variables, or None if none of them is set."""
    missing = [name for name in names if not env.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        there = ", ".join(f"{name}={env[name]}" for name in names if name not in missing)
        raise UserError(
            f"{' and '.join(missing)} missing: the environment has {there}; a run of several "
            f"processes needs {', '.join(names)}, one process none of them"
        )
    return [env[name] for name in names]


def _arguments(address: str, numbers: dict[str, str]) -> dict[str, Any] | None:
    processes, process = (_number(numbers, name) for name in numbers)
    if not 0 <= process < processes:
        given = ", ".join(f"{name}={text}" for name, text in numbers.items())
        raise UserError(f"{given}: processes count from 0 to one less than their number")
    if processes == 1:
        return None
    return {"coordinator_address": address, "num_processes": processes, "process_id": process}


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdigit():
        raise UserError(f"{name}={text!r} is not a number; a run of several processes needs it")
    return int(text)


def _on_tpu_pod(env: Mapping[str, str]) -> bool:
    """Returns whether this host is one of several hosts of a TPU slice, or of several slices."""
    if env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    if hosts := env.get("TPU_WORKER_HOSTNAMES"):
        return "," in hosts
    chips = Path("/dev").glob("accel[0-9]*"), Path("/dev/vfio").glob("[0-9]*")
    if "TPU_SKIP_MDS_QUERY" in env or not any(any(found) for found in chips):
        return False
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    return "," in _worker_endpoints(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    )


def _worker_endpoints(url: str) -> str:
    """Returns the workers of the TPU slice from the metadata server, '' without one."""
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _wait_for(address: str, seconds: int) -> None:
    """Returns once host:port accepts connections; raises UserError if it does not in time."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, ValueError) as e:
            if time.monotonic() >= end or isinstance(e, ValueError):
                raise UserError(
                    f"no coordinator answers at {address} after {seconds} s ({e}): is process 0 "
                    "running there, and can this host reach that port?"
                ) from None
        time.sleep(0.5)


@contextlib.contextmanager
def on_abort(explain: Callable[[], tuple[str, int]]) -> Iterator[None]:
    """Ends the process with one line instead of a C++ stack trace when JAX aborts it.

    JAX's C++ client aborts when the coordinator or another process is lost, and Python cannot catch
    that. A C signal handler therefore asks `explain` for the line and the exit status.
    """

    def handler(number: int) -> None:
        try:
            leave(*explain())
        finally:
            os._exit(RESTART)

    called = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = install(signal.SIGABRT, ctypes.cast(called, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, before)


def leave(message: str, status: int) -> NoReturn:
    """Prints the line and ends the process at once, whatever its other threads are doing."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(status)


# ---------------------------------------------------------------------------------- agreeing
def is_first() -> bool:
    """Returns whether this is process 0, which writes the files that a run has only once."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
    """Runs the function on process 0 only, and returns its result on every process.

    A UserError is raised on every process. Every process must call this; the result must be JSON.
    """
    if jax.process_count() == 1:
        return function()
    found = None
    if is_first():
        try:
            found = {"value": function()}
        except UserError as e:
            found = {"error": str(e)}
    text = np.frombuffer(json.dumps(found).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, size)
    found = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" in found:
        raise UserError(found["error"])
    return found["value"]


class FirstProcessWriter:
    """A writer that only process 0 opens; every process must make the same calls."""

    def __init__(self, open_writer: Callable[[], Any]):
        """Opens the writer, an object with `next_index`, `add(rows, ...)` and `finish()`."""
        opened: list[Any] = []

        def open_here() -> int:
            opened.append(open_writer())
            return opened[0].next_index

        self.next_index: int = on_first(open_here)
        self.writer = opened[0] if opened else None

    def add(self, rows: Any, *others: Any) -> None:
        """Writes the rows from `next_index` on."""
        self.next_index += len(rows)
        if self.writer is not None:
            self.writer.add(rows, *others)

    def finish(self, *arguments: Any) -> Any:
        """Finishes writing, and returns the writer's result (JSON) on every process."""
        return on_first(lambda: self.writer.finish(*arguments) if self.writer else None)


def barrier(where: str) -> None:
    """Returns when every process has reached the barrier of this name, which is used once.

    On CPUs, the first collective of some devices fails if one of them is half a minute late.
    """
    ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=_FOREVER)


def all_agree(yes: bool) -> bool:
    """Returns whether `yes` is true on every process; every process must call it."""
    return bool(np.all(gather(np.asarray([yes]))))


def gather(rows: np.ndarray) -> np.ndarray:
    """Returns the rows [b, ...] of all processes, in order, as [p * b, ...]; b is equal on all."""
    if jax.process_count() == 1:
        return rows
    found = np.asarray(multihost_utils.process_allgather(rows))
    return found.reshape(-1, *rows.shape[1:])


def gather_rows(batch: Any, real: int) -> Any:
    """Returns the rows of all processes in order, of each only the first `real` of its rows.

    `batch` is a tree of arrays on the devices, or of a process's own rows, padded to one length.
    """
    rows = jax.tree.map(local_rows, batch)
    mask = gather(np.arange(len(jax.tree.leaves(rows)[0])) < real)
    return jax.tree.map(lambda x: gather(x)[mask], rows)


def place(tree: Any, shardings: Any) -> Any:
    """Places a tree of arrays, which every process holds, by one sharding or a tree of them."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _, one=shardings: one, tree)

    def one(leaf: Any, sharding: Any) -> jax.Array:
        # JAX does not move what lies on the devices of one process to those of all.
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])

    return jax.tree.map(one, tree, shardings)


def fetch_global(array: jax.Array) -> np.ndarray:
    """Returns a global array as numpy on every process; every process must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


# ---------------------------------------------------------------------------------- checking
def check_mesh(mesh: Mesh) -> None:
    """Raises UserError unless every process holds its own, equally large part of a batch."""
    count = jax.process_count()
    if count == 1:
        return
    shards = shards_of_batch(mesh)
    places = jax.sharding.NamedSharding(mesh, BATCH).devices_indices_map((shards,))
    parts: dict[int, set[int]] = {}
    for device, (rows,) in places.items():
        parts.setdefault(device.process_index, set()).add(rows.start or 0)
    if shards % count or sum(map(len, parts.values())) != shards:
        raise UserError(
            f"config.mesh.tensor={mesh.shape['tensor']} puts one part of a batch on several of the "
            f"{count} processes: it must divide the {jax.local_device_count()} devices of one"
        )


def check_single(what: str) -> None:
    """Raises UserError in a run of several processes, for features that only one can use."""
    if jax.process_count() > 1:
        raise UserError(
            f"{what} is for one process, this run has {jax.process_count()}: start it on one host"
        )


def check_shared(workdir: Path) -> None:
    """Raises UserError on every process unless all of them see the same workdir."""
    if jax.process_count() == 1:
        return
    name = f".shared-{os.getpid()}-{time.time_ns()}"
    name = on_first(lambda: (_touch(workdir / name), name)[1])
    seen = _appears(workdir / name)
    everywhere = gather(np.asarray([seen]))
    if is_first():
        (workdir / name).unlink(missing_ok=True)
    if not np.all(everywhere):
        blind = [int(i) for i in np.flatnonzero(~everywhere)]
        raise UserError(
            f"--workdir={workdir} is not one directory to all hosts: processes {blind} do not see "
            "what process 0 writes there; use storage that all of them share"
        )


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as e:
        raise UserError(f"cannot write to {path.parent}: {e.strerror}") from None


def _appears(path: Path) -> bool:
    """Returns whether the file becomes visible; shared storage may show a new file late."""
    for _ in range(20):
        if path.exists():
            return True
        os.listdir(path.parent)
        time.sleep(0.5)
    return False


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Pads rows with zeros to `count` rows, so that all batches have one shape."""
    padded = np.zeros((count, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def local_rows(value: jax.Array) -> np.ndarray:
    """Returns the rows of a batch on this process's devices, in order."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)
    shards = {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
