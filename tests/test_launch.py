"""The launchers: the exact commands of dry runs, and how they restart a run."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Launcher -> what it cannot do without.
LAUNCHERS = {"local": [], "gpu": [], "slurm": [], "tpu": ["all", "--zone=z", "--type=v4-8"]}
# Words that a careless script would split, expand or drop.
ODD = ["--config.data.path=/my pictures/it's", '--config.sample.labels="a $HOME *"', "--config.x="]
RUN = ["--config=configs/bigr.py:L", "--workdir=runs/my run", *ODD]


def launch(script, *options, env=(), check=True, path=None):
    """Runs a launcher; returns what it printed, or with check=False the finished process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("BITGEN_", "VENV", "XLA_"))}
    if path is not None:
        kept["PATH"] = str(path)
    done = subprocess.run(
        [ROOT / "launch" / f"{script}.sh", *map(str, options)],
        env={**kept, **dict(env)},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=300,
    )
    if not check:
        return done
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(printed):
    """Returns the commands that a dry run printed, as a shell reads them."""
    lines = printed.splitlines()
    assert lines[0].startswith("# ")
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def dry(script, *options, **more):
    return commands(launch(script, *options, "--dry-run", "--", *RUN, **more))


def environment_step(venv, *packages):
    index = "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
    variables = ["env", f"VENV={venv}", "PYTHON=python3", index]
    return [*variables, "bash", "launch/environment.sh", *packages]


def install(venv, package):
    """Makes a virtual environment look as if it had a package."""
    (venv / f"lib/python3.12/site-packages/{package}-1.dist-info").mkdir(parents=True)


def write_programs(folder, **programs):
    """Writes shell scripts to put first on the PATH; returns that PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ---- All scripts ----


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "shellcheck is missing: pip install -e '.[test]' brings it"
    files = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    assert len(files) >= 9
    done = subprocess.run([program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_names_every_option(script):
    text = launch(script, "--help")
    source = (ROOT / "launch" / f"{script}.sh").read_text()
    (specs,) = re.findall(r'parse_options "([^"]*)"', source)
    options = [f"--{spec.split('=')[0]}" for spec in specs.split()]
    options += re.findall(r'"\$\{?1[^"]*" = (--[a-z-]+)', source)
    assert options
    for option in [*options, "--dry-run", "--help"]:
        assert option in text, option
    assert "set -euo" not in text


def refusal(script, *options, **more):
    """Returns the one line in which a launcher refuses what it was given."""
    done = launch(script, *options, check=False, **more)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (["--workdir=w"], "no --config=FILE"),
        (["--config=c"], "no --workdir=DIR"),
        ([], "no --config=FILE"),
    ],
)
def test_arguments_of_bitgen_are_checked(script, run, message):
    assert message in refusal(script, *LAUNCHERS[script], "--dry-run", "--", *run)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("local", ["--gpus=2"], "unknown option --gpus=2"),
        ("local", ["--config=c"], "bitgen's own go behind --"),
        ("local", ["--devices=0"], "--devices is a number, 1 or more, got '0'"),
        ("local", ["--processes=two"], "--processes is a number"),
        ("gpu", ["--nodes=2"], "--nodes=2 needs --node=I"),
        ("gpu", ["--nodes=2", "--node=2"], "--node=2 is not one of 2 machines"),
        ("gpu", ["--nodes=2", "--node=1"], "needs --coordinator=HOST:PORT"),
        ("slurm", ["--nodes="], "--nodes is a number"),
        ("slurm", ["--grace=5m"], "--grace is a number"),
        ("tpu", [], "unknown action '--': all, create"),
        ("tpu", ["rent"], "unknown action 'rent'"),
        ("tpu", ["all", "--type=v4-8"], "no --zone=ZONE"),
        ("tpu", ["all", "--zone=z"], "no --type=TYPE"),
        ("tpu", [*LAUNCHERS["tpu"], "--tier=cheap"], "none of spot, on-demand"),
        ("tpu", [*LAUNCHERS["tpu"], "--mount=/data"], "neither gs://BUCKET nor"),
        ("tpu", [*LAUNCHERS["tpu"], "--poll=0"], "--poll is a number"),
        ("tpu", ["delete", "--zone=z"], "delete takes no arguments of bitgen"),
    ],
)
def test_bad_options(script, options, message):
    assert message in refusal(script, *options, "--", *RUN)


@pytest.mark.parametrize(
    ("script", "missing"), [("gpu", "nvidia-smi"), ("slurm", "sbatch"), ("tpu", "gcloud")]
)
def test_a_missing_program_is_named(script, missing, tmp_path):
    for name in ("bash", "dirname", "basename", "sed", "tr"):
        (tmp_path / name).symlink_to(shutil.which(name))
    options = LAUNCHERS[script]
    said = refusal(script, *options, "--", *RUN, path=tmp_path)
    assert said.startswith(f"error: {missing} is not installed: ")
    # A dry run does without the program.
    assert missing in launch(script, *options, "--dry-run", "--", *RUN, path=tmp_path)


# ---- Dry runs ----


def test_local(tmp_path):
    venv = tmp_path / "my venv"
    python = [f"{venv}/bin/python", "-m", "bitgen.main", *RUN]
    assert dry("local", f"--venv={venv}") == [environment_step(venv, "convert"), python]
    assert not venv.exists()
    install(venv, "bitgen")
    assert dry("local", env={"BITGEN_VENV": str(venv)}) == [python]
    more = {"BITGEN_VENV": str(venv), "XLA_FLAGS": "--a=b"}
    flags = "XLA_FLAGS=--a=b --xla_force_host_platform_device_count=4"
    pretend = ["env", "JAX_PLATFORMS=cpu", flags, *python]
    assert dry("local", "--devices=4", env=more) == [pretend]
    met = ["env", "COORDINATOR_ADDRESS=localhost:77", "NUM_PROCESSES=2"]
    assert dry("local", "--processes=2", "--port=77", "--devices=4", env=more) == [
        [*met, f"PROCESS_ID={i}", *pretend] for i in range(2)
    ]


def test_gpu(tmp_path):
    python = [f"{tmp_path}/bin/python", "-m", "bitgen.main", *RUN]
    assert dry("gpu", f"--venv={tmp_path}") == [
        ["nvidia-smi", "--list-gpus"],
        environment_step(tmp_path, "convert", "jax[cuda13]"),
        ["env", "JAX_PLATFORMS=cuda,cpu", *python],
    ]
    install(tmp_path, "bitgen")  # which is not enough
    assert len(dry("gpu", f"--venv={tmp_path}")) == 3
    install(tmp_path, "jax_cuda12_plugin")
    options = ["--gpus=0,2", "--nodes=3", "--node=2", "--coordinator=10.0.0.1:99"]
    variables = ["JAX_PLATFORMS=cuda,cpu", "CUDA_VISIBLE_DEVICES=0,2"]
    variables += ["COORDINATOR_ADDRESS=10.0.0.1:99", "NUM_PROCESSES=3", "PROCESS_ID=2"]
    assert dry("gpu", f"--venv={tmp_path}", *options)[1:] == [["env", *variables, *python]]


def test_slurm(tmp_path):
    options = ["--nodes=4", "--partition=a100", "--sbatch=--account=my lab", f"--venv={tmp_path}"]
    environment, folder, sbatch, srun = dry("slurm", *options, env={"BITGEN_TIME": "2:00:00"})
    assert environment == environment_step(tmp_path, "convert", "jax[cuda13]")
    assert folder == ["mkdir", "-p", "runs/slurm"]
    assert sbatch[:4] == ["env", f"BITGEN_VENV={tmp_path}", "JAX_PLATFORMS=cuda,cpu", "sbatch"]
    script = sbatch.index("launch/slurm_job.sh")
    sizes = ["--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8"]
    queue = ["--time=2:00:00", "--requeue", "--signal=B:USR1@300", "--open-mode=append"]
    places = [f"--chdir={ROOT}", "--output=runs/slurm/%x-%j.log"]
    names = ["--job-name=bitgen", "--account=my lab", "--partition=a100"]
    assert sorted(sbatch[4:script]) == sorted([*sizes, *queue, *places, *names])
    assert sbatch[script + 1 :] == RUN
    python = [f"{tmp_path}/bin/python", "-m", "bitgen.main", *RUN]
    assert srun == ["srun", "--kill-on-bad-exit=1", *python]


ZONE = ["--zone=us-west4-a", "--quiet"]
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--worker=all"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def remote(command):
    """Returns the words of a command for every host."""
    assert command[: len(SSH)] == SSH
    assert command[len(SSH) + 1 :] == ZONE
    assert command[len(SSH)].startswith("--command=")
    return shlex.split(command[len(SSH)].removeprefix("--command="))


def test_tpu_does_all_in_order():
    options = ["--zone=us-west4-a", "--type=v5litepod-32", "--name=pod", "--mount=gs://my-bucket"]
    printed = launch("tpu", "all", *options, "--dry-run", "--", *RUN)
    found = commands(printed)
    describe = [*QUEUED, "describe", "pod", "--format=value(state.state)", *ZONE]
    kind = ["--accelerator-type=v5litepod-32", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    request = [*QUEUED, "create", "pod", "--node-id=pod", *kind, *ZONE]
    assert found[:3] == [describe, request, describe]

    def check_begin(steps):
        there, tar, copy, unpack, install, start = steps
        assert remote(there) == ["true"]
        assert tar[:2] == ["tar", "-czf"]
        assert {"bitgen", "configs", "launch", "pyproject.toml"} < set(tar)
        assert all((ROOT / name).exists() for name in tar[4:])
        assert copy[5:] == [tar[2], "pod:bitgen.tar.gz", "--worker=all", *ZONE]
        assert remote(unpack)[-5:] == ["tar", "-xzf", "bitgen.tar.gz", "-C", "bitgen"]
        worker = ["cd", "bitgen", "&&", "bash", "launch/tpu_worker.sh"]
        assert remote(install) == [*worker, "install", "gs://my-bucket", "/mnt/bitgen"]
        assert remote(start) == [*worker, "start", *RUN]

    check_begin(found[3:9])
    assert found[9] == describe
    assert "state;" in remote(found[10])
    assert found[11:13] == [[*QUEUED, "delete", "pod", "--force", *ZONE], request]
    check_begin(found[13:])
    assert "launch/tpu.sh delete --name=pod --zone=us-west4-a" in printed
    begin = "#   there: "
    there = [shlex.split(line[len(begin) :]) for line in printed.splitlines() if begin in line]
    assert ["sudo", "mkdir", "-p", "/mnt/bitgen"] in there
    assert there[-1][-len(RUN) :] == RUN


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [("v6e-16", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v4-32", "tpu-ubuntu2204-base")],
)
def test_tpu_runtime_follows_the_type(type_, runtime):
    options = ["create", "--zone=z", f"--type={type_}", "--tier=on-demand", "--project=p"]
    create = commands(launch("tpu", *options, "--dry-run"))[1]
    assert f"--runtime-version={runtime}" in create
    assert "--spot" not in create
    assert "--project=p" in create


@pytest.mark.parametrize("action", ["log", "stop"])
def test_tpu_small_actions(action):
    (found,) = commands(launch("tpu", action, "--zone=us-west4-a", "--name=pod", "--dry-run"))
    assert remote(found)[-2:] == ["launch/tpu_worker.sh", action]


# ---- Real runs, with scripts in place of gcloud, Python and Slurm ----

# A cloud of two hosts, which are folders here.
GCLOUD = r"""
echo "$*" >> "$FAKE/calls"
case "$*" in
  *describe*) cat "$FAKE/state" 2> /dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  *queued-resources*create*) mkdir -p "$FAKE"/hosts/{0,1}; echo ACTIVE > "$FAKE/state" ;;
  *queued-resources*delete*) rm -r "$FAKE/hosts" "$FAKE/state" ;;
  *) grep -q ACTIVE "$FAKE/state" || exit 1
     for host in "$FAKE"/hosts/*; do
       for word in "$@"; do
         case "$word" in
           *.tar.gz) [ -e "$word" ] && cp "$word" "$host/bitgen.tar.gz" ;;
           --command=*) (cd "$host" && HOME="$host" bash -c "${word#*=}") || exit 1 ;;
         esac
       done
     done ;;
esac
"""
# A Python that writes down its arguments and ends its n-th run as line n of the plan says.
PYTHON = r"""
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *"-m pip install"*)
    echo "${@: -2}" >> "$FAKE/pip"
    mkdir -p "$(dirname "$0")/../lib/python3.12/site-packages/libtpu-1.dist-info" ;;
  "-m bitgen.main "*)
    printf '%s\n' "${@:3}" > "$HOME/words"
    [ "${HOME##*/}" = 0 ] || { sleep 1; exit 0; }
    echo run >> "$FAKE/runs"
    case "$(sed -n "$(wc -l < "$FAKE/runs")p" "$FAKE/plan")" in
      preempt) echo SUSPENDED > "$FAKE/state" ;;
      lost) exit 75 ;;
      crash) echo "error: bad luck"; exit 2 ;;
      sigterm) kill -TERM "$PPID"; exec sleep 1 ;;
      vanish) sleep 3; rm -f "$HOME/bitgen-run/state"; kill -KILL "$PPID" ;;
      wait) exec sleep 60 ;;
    esac ;;
esac
"""


def on_cloud(cloud, action, *run, plan=(), check=True):
    """Runs an action of launch/tpu.sh on the cloud in a folder, with a plan for its Python."""
    (cloud / "plan").write_text("\n".join(plan) + "\n")
    options = [action, "--zone=z", "--type=v5litepod-16", "--poll=1", "--restarts=4"]
    env = {"FAKE": str(cloud), "TMPDIR": str(cloud)}
    path = write_programs(cloud / "programs", gcloud=GCLOUD, python3=PYTHON)
    words = ["--", *run] if run else []
    return launch("tpu", *options, *words, env=env, path=path, check=check)


def calls(cloud, word):
    return sum(word in line for line in (cloud / "calls").read_text().splitlines())


@pytest.mark.slow
def test_tpu_goes_on_after_a_preemption_a_signal_and_a_reboot(tmp_path):
    printed = on_cloud(tmp_path, "all", *RUN, plan=["preempt", "lost", "sigterm", "vanish"])
    assert (tmp_path / "runs").read_text().count("run") == 5
    assert calls(tmp_path, "queued-resources create") == 2
    assert calls(tmp_path, "queued-resources delete") == 1
    for host in ("0", "1"):  # the words arrived as they were given
        assert (tmp_path / "hosts" / host / "words").read_text().splitlines() == RUN
    twice = 2 * 2  # hosts
    assert (tmp_path / "pip").read_text().splitlines() == [".[convert] jax[tpu]"] * twice
    after_loss, after_signal = "ACTIVE ended 0 ended 75 \n", "ACTIVE ended 0 stopped"
    for state in ("SUSPENDED", after_loss, after_signal, "gone", "ACTIVE ended 0 \n"):
        assert state in printed
    # The same command finds the TPU, and requests none.
    on_cloud(tmp_path, "all", *RUN)
    assert calls(tmp_path, "queued-resources create") == 2


@pytest.mark.slow
def test_tpu_tells_of_a_failure_and_keeps_the_log(tmp_path):
    done = on_cloud(tmp_path, "all", *RUN, plan=["crash"], check=False)
    assert done.returncode == 2
    assert "error: bad luck" in done.stdout
    assert "the run failed" in done.stderr
    assert (tmp_path / "runs").read_text() == "run\n"
    assert calls(tmp_path, "queued-resources delete") == 0
    on_cloud(tmp_path, "delete")
    assert not (tmp_path / "hosts").exists()


@pytest.mark.slow
def test_tpu_stops_by_hand(tmp_path):
    on_cloud(tmp_path, "create")
    on_cloud(tmp_path, "install")
    on_cloud(tmp_path, "run", *RUN, plan=["wait"])
    on_cloud(tmp_path, "run", *RUN, plan=["wait"])  # it runs already
    assert (tmp_path / "runs").read_text() == "run\n"
    on_cloud(tmp_path, "stop")
    assert "stopped by hand" in on_cloud(tmp_path, "watch", *RUN)
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "status", "runs"),
    [("lost lost done", 0, 3), ("lost lost lost", 75, 3), ("crash", 2, 1)],
)
def test_gpu_restarts_by_itself(plan, status, runs, tmp_path):
    install(tmp_path, "jax_cuda13_plugin")
    write_programs(tmp_path / "bin", python=PYTHON)
    path = write_programs(tmp_path / "programs", **{"nvidia-smi": ""})
    home = tmp_path / "0"
    home.mkdir()
    (tmp_path / "plan").write_text(plan.replace(" ", "\n") + "\n")
    options = [f"--venv={tmp_path}", "--restarts=2", "--", *RUN]
    env = {"FAKE": str(tmp_path), "HOME": str(home)}
    done = launch("gpu", *options, env=env, path=path, check=False)
    assert done.returncode == status
    assert (tmp_path / "runs").read_text() == runs * "run\n"
    assert (home / "words").read_text().splitlines() == RUN


SRUN = r"""
printf '%s\n' "$@" > "$FAKE/words"
[ ! -e "$FAKE/status" ] || exit "$(cat "$FAKE/status")"
trap 'echo saved; exit 0' TERM
echo "$$" > "$FAKE/pid"
while true; do sleep 0.1; done
"""
SCANCEL = r"""
echo "$@" > "$FAKE/cancelled"
kill -TERM "$(cat "$FAKE/pid")"
"""
SCONTROL = 'echo "$@" > "$FAKE/requeued"'


def slurm_job(folder):
    """Starts the job as Slurm does."""
    environment = {
        "PATH": write_programs(folder, srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL),
        "FAKE": str(folder),
        "SLURM_JOB_ID": "17",
        "BITGEN_VENV": "/shared/my venv",
    }
    command = [ROOT / "launch" / "slurm_job.sh", *RUN]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (75, True)])
def test_slurm_job_queues_again_after_a_fault_of_the_cluster(tmp_path, status, again):
    (tmp_path / "status").write_text(str(status))
    job = slurm_job(tmp_path)
    job.communicate(timeout=60)
    assert job.returncode == status
    assert (tmp_path / "requeued").exists() == again


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_job_saves_and_queues_again_when_its_time_ends(tmp_path, number):
    job = slurm_job(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(number)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert printed.splitlines()[-1] == "saved"
    words = ["--kill-on-bad-exit=1", "/shared/my venv/bin/python", "-m", "bitgen.main", *RUN]
    assert (tmp_path / "words").read_text().splitlines() == words
    assert shlex.split(printed.splitlines()[0])[2:] == words
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 17\n"
    # After a preemption, Slurm itself queues the job again.
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)


@pytest.mark.slow
def test_local_trains_and_goes_on_as_two_processes(tmp_path):
    venv = Path(sys.executable).parent.parent
    run = [
        "--config=configs/digits_tokenizer.py",
        f"--workdir={tmp_path / 'my run'}",
        "--config.data.image_size=8",
        "--config.model.image_size=8",
        "--config.train.batch_size=8",
        "--config.train.preview_every=0",
    ]
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "BITGEN_VENV": str(venv)}
    launch("local", "--devices=2", "--", *run, "--config.train.steps=1", env=env)
    assert (tmp_path / "my run" / "model" / "model.json").is_file()
    two = ["--devices=1", "--processes=2", f"--port={port}", "--"]
    done = launch("local", *two, *run, "--config.train.steps=2", env=env, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert f"resuming {tmp_path / 'my run'} at step 1" in printed
    assert "2 devices" in printed
