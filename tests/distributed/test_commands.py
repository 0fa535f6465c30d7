"""Commands as two real processes on one machine, against the same command as one process."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from gradot_jax.cli.main import main
from gradot_jax.offsite.adapter_file import load_adapter_for
from gradot_jax.offsite.bundle import receive

SPLIT = ["--num-bottom", "1", "--num-top", "1"]


@pytest.fixture(scope="session")
def bundle(checkpoint, text, tmp_path_factory):
    """What one process on one device compresses."""
    out = tmp_path_factory.mktemp("single") / "out"
    assert main([*compression(checkpoint, text, out), "--mesh", "1", "1"]) == 0
    return out / "bundle"


@pytest.fixture
def grouped_bundle(grouped_checkpoint, text, tmp_path):
    """The same of a model with grouped queries."""
    alone(compression(grouped_checkpoint, text, tmp_path / "compressed"))
    return tmp_path / "compressed" / "bundle"


def compression(checkpoint, text, out):
    data = ["--calibration", str(text), "--num-sequences", "16", "--sequence-length", "16"]
    where = ["--model", str(checkpoint), "--out", str(out), "--budget", "0.6"]
    return ["compress", *where, *data, *SPLIT]


def tuning(bundle, text, out, num_steps):
    where = ["--bundle", str(bundle), "--train", str(text), "--out", str(out)]
    steps = ["--num-steps", str(num_steps), "--schedule", "constant", "--warmup-steps", "0"]
    rate = ["--learning-rate", "1e-3", "--batch-size", "4", "--evaluate-every", "1000"]
    return ["finetune", *where, *steps, *rate]


def alone(arguments):
    assert main([*arguments, "--mesh", "1", "1"]) == 0


def adapter(bundle, out):
    """The tuned adapter, less the biases of its keys.

    Softmax does not see those: their gradient is rounding, of which Adam makes whole steps.
    """
    tuned = load_adapter_for(out / "adapter", receive(bundle))
    return [end.replace(k_proj=end.k_proj.replace(bias=None)) for end in (tuned.bottom, tuned.top)]


def records(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for_steps(out, processes, count):
    for _ in range(600):
        assert all(process.poll() is None for process in processes)
        if (out / "metrics.jsonl").exists() and len(records(out)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("no step was taken")


def test_run_stopped_in_one_process_is_saved_by_all_and_goes_on_in_one(
    bundle, text, tmp_path, start_together, assert_close
):
    processes = start_together(tuning(bundle, text, tmp_path / "run", 100_000))
    wait_for_steps(tmp_path / "run", processes, 3)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, errors
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert all(f"after step {step}, which is saved" in error for error in errors)
    assert len(records(tmp_path / "run")) == step

    alone([*tuning(bundle, text, tmp_path / "run", step + 2), "--resume"])
    alone(tuning(bundle, text, tmp_path / "whole", step + 2))
    assert_close(*(adapter(bundle, tmp_path / name) for name in ("run", "whole")), "float32_model")


def test_run_begun_in_one_process_is_ended_by_two_that_split_its_heads_and_written_once(
    grouped_bundle, text, tmp_path, run_together, assert_close
):
    alone(tuning(grouped_bundle, text, tmp_path / "run", 3))
    rest = tuning(grouped_bundle, text, tmp_path / "run", 5)
    printed = run_together([*rest, "--resume", "--mesh", "2", "2"])
    assert [bool(output.strip()) for output in map(without_collectives, printed)] == [True, False]
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5]
    alone(tuning(grouped_bundle, text, tmp_path / "whole", 5))
    tuned = (adapter(grouped_bundle, tmp_path / name) for name in ("run", "whole"))
    assert_close(*tuned, "float32_model")


def test_where_there_is_no_cluster_the_command_says_how_to_describe_one(bundle, text, tmp_path):
    command = [*tuning(bundle, text, tmp_path / "out", 2), "--distributed"]
    program = [sys.executable, "-m", "gradot_jax.cli.main", *command]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert "no cluster to join" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_description_of_a_cluster_without_distributed_is_refused(bundle, text, tmp_path, capsys):
    assert main([*tuning(bundle, text, tmp_path / "out", 2), "--process-id", "0"]) == 3
    assert "--process-id go with --distributed" in capsys.readouterr().err


GLOO = "[Gloo] Rank 0 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3"


def without_collectives(output):
    """What the program itself printed: the collectives of XLA for CPUs print, too.

    Theirs are lines of the same few words, which two threads print by pieces into each other.
    """
    theirs = set(re.findall("[A-Za-z]+", GLOO))
    words = {line: set(re.findall("[A-Za-z]+", line)) for line in output.splitlines()}
    return "\n".join(line for line in words if not words[line] <= theirs)


def test_compression_by_two_processes_is_that_of_one_and_written_once(
    checkpoint, text, bundle, tmp_path, run_together, assert_close, with_signs_of
):
    printed = run_together(compression(checkpoint, text, tmp_path / "out"))
    assert [bool(output.strip()) for output in map(without_collectives, printed)] == [True, False]
    together, single = (receive(folder) for folder in (tmp_path / "out" / "bundle", bundle))
    got = with_signs_of(single.emulator, together.emulator)
    assert_close(got, single.emulator, "float32_model")
    plans = [
        json.loads((folder / "owner" / "plan.json").read_text())
        for folder in (tmp_path / "out", bundle.parent)
    ]
    assert plans[0] == plans[1]
