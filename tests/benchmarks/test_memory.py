import dataclasses
import json
import sys

import pytest

from benchmarks import memory
from benchmarks.floor import Cost
from benchmarks.harness import Phase
from benchmarks.workloads import STEPS, WORKLOADS
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
        monkeypatch.setattr(memory, "_output", lambda command: ["checkpoint"])
    monkeypatch.setattr(memory, "_LENGTH", 16)
    record = memory.compress_command(SMALL, whole=whole)
    *runs, bundled = commands
    assert list(record["runs"]) == (["whole"] if whole else ["layers", "after"])
    assert record["peak_bytes"] == 10**6 * len(runs) == record["share"] * record["allowed_bytes"]
    assert record["bundled_model_bytes"] == 10**6 * len(commands)
    assert any(part.endswith("tiny_opt") for part in bundled)
    parts = ("checkpoint_bytes", "layer_bytes", "boundary_bytes")
    assert record["allowed_bytes"] == sum(record[part] for part in parts)
    assert record["boundary_bytes"] == 4 * (4 + 1) * 4 * 16 * 16
    # Once the same command is really asked what it would need.
    assert any("checkpoint" in line for line in record["estimate"])
    json.dumps(record)


def test_the_written_checkpoint_is_one_in_float16(tmp_path):
    folder = memory.write_checkpoint(tmp_path / "model", SMALL)
    config, params = load_model(folder, dtype=None)
    assert config == SMALL
    assert params.shell.embed_tokens.dtype == "float16"
    assert (folder / "tokenizer.json").is_file()
