import dataclasses
import json
import sys
import tracemalloc

import jax
import pytest

from benchmarks import memory
from benchmarks.floor import Cost
from benchmarks.harness import Phase
from benchmarks.workloads import STEPS, WORKLOADS, random_array
from gradot_jax.models.checkpoint import load_model

SMOKE = WORKLOADS["cpu"]["smoke"]
SMALL = dataclasses.replace(
    SMOKE.config, num_hidden_layers=8, vocab_size=2048, max_position_embeddings=128
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_sweep_is_compared_with_a_gradient_and_two_layers_factors():
    record = memory.compiled_sweep(SMOKE)
    assert record["layer_factor_bytes"] == 4 * 4_096
    assert record["allowed_bytes"] == record["gradient_bytes"] + 2 * 4 * 4_096
    assert record["share"] == record["sweep_bytes"] / record["allowed_bytes"] > 0


def test_steps_need_less_memory_the_less_they_train():
    record = memory.compiled_steps(SMOKE)
    assert record["step_all"]["memory_reduction"] == 1
    sizes = [record[kind]["bytes"] for kind in STEPS]
    assert sizes == sorted(sizes)


@LINUX
def test_what_a_run_holds_is_measured_above_what_was_held_before():
    held = []

    def run():
        held.append(b"x" * (64 * 2**20 if held else 1))

    phase = Phase(run=run, cost=Cost())
    assert memory.held_by(phase) == pytest.approx(64 * 2**20, rel=0.1)


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import time; {code}"]


@LINUX
def test_a_process_is_watched_while_it_runs():
    record = memory._watch(_python("block = b'x' * 2**26; time.sleep(0.5)"))
    assert record["peak_bytes"] >= record["peak_anonymous_bytes"] > 2**26
    assert record["seconds"] >= 0.5
    with pytest.raises(RuntimeError, match="code 3"):
        memory._watch(_python("exit(3)"))


@LINUX
def test_a_process_is_watched_until_it_says_so():
    said = "layers: 2 of 2"
    code = f"print('{said}', flush=True); time.sleep(60); block = b'x' * 2**26"
    record = memory._watch(_python(code), until=said)
    assert record["seconds"] < 30 and record["peak_bytes"] < 2**26
    with pytest.raises(RuntimeError, match="code 0"):
        memory._watch(_python("pass"), until=said)


@pytest.mark.parametrize("whole", [False, True])
def test_the_commands_memory_is_told_beside_what_is_allowed(monkeypatch, whole):
    commands = []

    def watch(command, until=""):
        commands.append(command)
        held = len(commands) * 10**6
        return dict.fromkeys(("peak_bytes", "peak_anonymous_bytes", "peak_file_bytes"), held)

    monkeypatch.setattr(memory, "_watch", watch)
    if whole:
        said = ["host: checkpoint      7 MiB", "at the peak           1,024 MiB of 2,048 MiB"]
        monkeypatch.setattr(memory, "_output", lambda command: said)
    monkeypatch.setattr(memory, "_LENGTH", 16)
    record = memory.compress_command(SMALL, "float16", whole=whole)
    *runs, rest = commands
    assert list(record["runs"]) == (["whole"] if whole else ["layers", "after"])
    assert record["peak_bytes"] == 10**6 * len(runs) == record["share"] * record["allowed_bytes"]
    assert rest[-1] == "--dry-run" and record["rest_bytes"] == 10**6 * len(commands)
    parts = ("checkpoint_bytes", "layer_bytes", "boundary_bytes")
    assert record["allowed_bytes"] == sum(record[part] for part in parts)
    assert record["boundary_bytes"] == 4 * (4 + 1) * 4 * 16 * 16
    # Once the same command is really asked what it would need.
    assert any("checkpoint" in line for line in record["estimate"])
    assert record["predicted_bytes"] == 2**30 if whole else record["predicted_bytes"] > 2**28
    assert record["over_predicted"] == -(10**6) / record["predicted_bytes"]
    json.dumps(record)


@pytest.mark.parametrize(
    ("config", "dtype"), [(SMALL, "float16"), (WORKLOADS["cpu"]["smoke-llama"].config, "bfloat16")]
)
def test_the_written_checkpoint_is_one_in_its_dtype(config, dtype, tmp_path):
    folder = memory.write_checkpoint(tmp_path / "model", config, dtype)
    read, params = load_model(folder, dtype=None)
    assert read == config
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert (folder / "tokenizer.json").is_file()


def test_a_checkpoint_is_written_without_a_copy_of_it(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=2**20, num_hidden_layers=4)
    random_array((1,), "bfloat16")
    tracemalloc.start()
    memory.write_checkpoint(tmp_path / "model", config, "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    table = 2 * config.vocab_size * config.hidden_size
    assert table < peak < 1.9 * table + 2**20 * 8
