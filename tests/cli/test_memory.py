import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.cli.compare import Compare
from gradot_jax.cli.compress import Compress
from gradot_jax.cli.evaluate import Evaluate
from gradot_jax.cli.finetune import Finetune
from gradot_jax.cli.main import main
from gradot_jax.cli.memory import memory_advice

FINETUNE = ["finetune", "--bundle", "bundle", "--train", "train.txt", "--out", "out"]
COMMANDS = (Compare, Compress, Evaluate, Finetune)


def device_array(self):
    jnp.zeros((1 << 20, 1 << 22)).block_until_ready()


def host_array(self):
    np.zeros((1 << 40, 1 << 8))


@pytest.mark.parametrize("exhaust", [device_array, host_array])
def test_lack_of_memory_is_answered_by_the_options_that_help(monkeypatch, capsys, exhaust):
    monkeypatch.setattr(Finetune, "run", exhaust)
    assert main(FINETUNE) == 1
    (paragraph,) = capsys.readouterr().err.splitlines()
    assert paragraph.startswith("gradot: error: out of memory; these need less of it: --remat;")
    for option in ("--accumulate", "--batch-size", "--sequence-length", "bfloat16", "--mesh"):
        assert option in paragraph


def test_options_that_are_used_already_are_not_advised(monkeypatch, capsys):
    monkeypatch.setattr(Finetune, "run", device_array)
    assert main([*FINETUNE, "--remat", "--dtype", "bfloat16"]) == 1
    advice = capsys.readouterr().err
    assert "--remat" not in advice
    assert "bfloat16" not in advice
    assert "--batch-size" in advice


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_helps_is_one_of_the_command_and_has_advice(command):
    fields = {field.name for field in dataclasses.fields(command)}
    assert command.MEMORY
    assert set(command.MEMORY) <= fields
    plain = dataclasses.make_dataclass("Plain", [(name, str, "") for name in command.MEMORY])
    plain.MEMORY = command.MEMORY
    assert memory_advice(plain()).count("; ") == len(command.MEMORY)
