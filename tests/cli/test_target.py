"""`--dry-run` and `--target`: what is refused, and what is said of the devices that are here."""

import os
import subprocess
import sys

import pytest

from gradot_jax.cli.main import main

DONE, REFUSED = 0, 3


@pytest.fixture
def bundle(checkpoint, text, tmp_path):
    out = tmp_path / "offsite"
    options = ["--num-bottom", "1", "--num-top", "0", "--sequence-length", "8"]
    sizes = ["--num-sequences", "16", "--batch-size", "8"]
    given = ["--model", str(checkpoint), "--calibration", str(text), "--out", str(out)]
    assert main(["compress", *given, *options, *sizes]) == DONE
    return out / "bundle"


def commands(checkpoint, bundle, text, out):
    text, out = str(text), str(out)
    return {
        "compress": ["--model", str(checkpoint), "--calibration", text, "--out", out],
        "finetune": ["--bundle", str(bundle), "--train", text, "--validation", text, "--out", out],
        "evaluate": ["--bundle", str(bundle), "--data", text, "--out", out],
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "v5e:2x4"], "--target goes with --dry-run"),
        (["--target", "v5e", "--dry-run"], "--target: unknown: 'v5e'; expected a TPU slice"),
        (["--target", "h100x8", "--dry-run", "--mesh", "8", "2"], "needs 16 devices, h100x8 has 8"),
        (["--target", "v5e:2x4", "--dry-run", "--distributed"], "without --distributed"),
        (["--target", "v5e:2x4", "--dry-run", "--mesh", "-2", "-4"], "--mesh: both numbers must"),
        (["--dry-run", "--mesh", "0", "1"], "--mesh: both numbers must be at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "finetune", "evaluate"])
def test_what_makes_no_sense_is_refused(
    command, options, said, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    given = commands(tmp_path / "model", tmp_path / "bundle", text, tmp_path / "out")[command]
    assert main([command, *given, *options]) == REFUSED
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "programs"),
    [
        ("finetune", ["training step", "validation step"]),
        ("evaluate", ["loss of a batch"]),
    ],
)
def test_a_dry_run_compiles_for_the_devices_that_are_here(
    command, programs, checkpoint, bundle, text, tmp_path, capsys
):
    given = commands(checkpoint, bundle, text, tmp_path / "out")[command]
    assert main([command, *given, "--dry-run", "--sequence-length", "8"]) == DONE
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(tuple(programs))]
    assert len(rows) == len(programs)
    # Arguments, outputs, aliases, temporaries, code, what lies beside, the peak, and how often.
    assert all(len(row.split()[-8:]) == 8 and int(row.split()[-1]) > 0 for row in rows)
    assert "are available" in printed and "compiled for          cpu here" in printed
    assert not (tmp_path / "out").exists()


def test_without_its_compiler_a_target_says_what_to_install(checkpoint, text, tmp_path):
    given = commands(checkpoint, tmp_path, text, tmp_path / "out")["compress"]
    # No package of a plugin is found in such a process.
    hide = "import sys; sys.modules['libtpu'] = sys.modules['jax_plugins'] = None; "
    start = "from gradot_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hide + start, "compress", *given, "--dry-run"]
    for target, extra in (("v5e:2x4", "tpu"), ("h100", "compile-gpu")):
        done = subprocess.run([*command, "--target", target], capture_output=True, text=True)
        assert done.returncode == REFUSED
        said = " ".join(done.stderr.split())
        assert f"--target {target}: its compiler is not there" in said
        assert f"gradot_jax[{extra}]" in said


def test_a_dry_run_refuses_what_the_run_would(checkpoint, text, tmp_path, capsys):
    given = commands(checkpoint, tmp_path, text, tmp_path / "out")["compress"]
    more = ["--num-top", "0", "--num-bottom", "1", "--sequence-length", "8"]
    assert main(["compress", *given, *more, "--skip-positions", "8", "--dry-run"]) == REFUSED
    assert "--skip-positions 8 leaves no token of sequences of 8" in capsys.readouterr().err
