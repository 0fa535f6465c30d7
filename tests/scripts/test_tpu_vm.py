"""The launcher of TPU pods: what it would run here, and what that would run there."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "scripts" / "tpu_vm" / "launch.sh"
TPU = {"TPU_NAME": "opt", "ZONE": "zone-b"}


def launch(*arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("TPU_NAME", "ZONE", "PROJECT")}
    return subprocess.run(
        ["bash", str(LAUNCH), *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def dry_run(*arguments, **variables):
    """The programs that would be run, as lists of words."""
    result = launch("--dry-run", *arguments, **TPU, **variables)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def command_of(program):
    (command,) = [word for word in program if word.startswith("--command=")]
    return command.removeprefix("--command=")


def on_worker(command, home):
    return subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True)


def make_interpreter(home):
    """A program that prints its words, in the place of the workers' interpreter."""
    python = home / "gradot_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" $$ "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)


def test_a_command_reaches_every_worker_with_its_words_intact(tmp_path):
    words = ["finetune", "--train", "a file's name.txt", "--bundle", "$HOME", "--out", "out"]
    (program,) = dry_run(*words, PROJECT="mine")
    assert program[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "opt"]
    assert program[7:] == ["--worker=all", "--zone=zone-b", "--project=mine"]
    make_interpreter(tmp_path)
    result = on_worker(command_of(program), tmp_path)
    process, path, *given = result.stdout.splitlines()
    assert given == ["-u", "-m", "gradot_jax.cli.main", *words, "--distributed"]
    assert path == "gradot_jax"
    # What `stop` signals is the program itself.
    assert (tmp_path / ".gradot_jax.pid").read_text().strip() == process


def test_stop_signals_the_program_that_was_started(tmp_path):
    (program,) = dry_run("stop")
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        (tmp_path / ".gradot_jax.pid").write_text(f"{sleeping.pid}\n")
        assert on_worker(command_of(program), tmp_path).returncode == 0
        assert sleeping.wait(timeout=10) == -15


def test_setup_copies_the_checkout_and_installs_it():
    copy, install = dry_run("setup", PYTHON="python3.11")
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6:] == ["opt:", "--worker=all", "--zone=zone-b"]
    command = command_of(install)
    assert "tar -xzf gradot_jax.tar.gz -C gradot_jax" in command
    assert "export PYTHON=python3.11" in command
    assert command.endswith(". scripts/setup_venv.sh; setup_venv tpu")
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0


def test_mount_is_the_same_on_every_worker_and_done_once():
    (program,) = dry_run("mount", "bucket", "/tmp/shared")
    assert "--worker=all" in program
    assert command_of(program) == (
        "mkdir -p /tmp/shared && "
        "{ mountpoint -q /tmp/shared || "
        "gcsfuse --implicit-dirs --rename-dir-limit=1000 bucket /tmp/shared; }"
    )


def test_help_teaches_and_needs_no_tpu():
    result = launch("--help")
    assert result.returncode == 0
    for word in ("setup", "mount", "stop", "TPU_NAME", "REMOTE_DIR", "--dry-run"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["finetune"], {}, "set TPU_NAME"),
        (["inspect"], TPU, "expected setup, mount, stop, compress, finetune or evaluate"),
        ([], TPU, "expected setup, mount"),
        (["mount", "bucket"], TPU, "mount takes a bucket and a folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, variables, message):
    result = launch(*arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr
