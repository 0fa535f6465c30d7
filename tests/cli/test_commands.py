import dataclasses
import json
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradot_jax
import gradot_jax.cli.finetune
from gradot_jax.cli.inspect import Inspect
from gradot_jax.cli.main import main
from gradot_jax.memory import available
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.params import init_params, unstack_blocks
from gradot_jax.models.run import forward
from gradot_jax.offsite.adapter_file import load_adapter_for
from gradot_jax.offsite.bundle import receive
from gradot_jax.training import adapter
from gradot_jax.training.stop import Interrupted

IDS = np.array([[2, 4, 5, 7, 9, 11], [2, 22, 3, 8, 10, 6]], np.int32)
DONE, USAGE, REFUSED = 0, 2, 3


def compress(checkpoint, text, out, *more):
    split = ["--num-bottom", "1", "--num-top", "0", "--mesh", "1", "1"]
    data = ["--calibration", str(text), "--budget", "0.5"]
    return main(["compress", "--model", str(checkpoint), *data, "--out", str(out), *split, *more])


def finetune(bundle, train, out, *more):
    settings = ["--num-steps", "4", "--batch-size", "2", "--learning-rate", "1e-2"]
    devices = ["--mesh", "1", "1"]
    where = ["--bundle", str(bundle), "--train", str(train), "--out", str(out)]
    return main(["finetune", *where, *settings, *devices, *more])


def torch_logits(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.OPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def test_flax_checkpoint_goes_through_to_a_plugged_in_model(any_checkpoint, text, tmp_path):
    run, tuned, out = tmp_path / "run", tmp_path / "tuned", tmp_path / "out"
    assert compress(any_checkpoint, text, run) == DONE
    assert finetune(run / "bundle", text, tuned, "--validation", str(text)) == DONE
    plug_in = ["plug-in", "--model", str(any_checkpoint), "--adapter", str(tuned / "adapter")]
    assert main([*plug_in, "--owner", str(run / "owner"), "--out", str(out)]) == DONE

    config, original = load_model(any_checkpoint)
    _, plugged = load_model(out)
    before, after = original.segments[0], plugged.segments[0]
    assert not np.array_equal(before.fc1.kernel[0], after.fc1.kernel[0])
    np.testing.assert_array_equal(before.fc1.kernel[1], after.fc1.kernel[1])
    np.testing.assert_array_equal(original.shell.embed_tokens, plugged.shell.embed_tokens)
    logits = forward(config, plugged, IDS)
    np.testing.assert_allclose(torch_logits(out), logits, atol=1e-4)


def test_exported_emulator_is_the_emulator_in_torch(any_checkpoint, text, tmp_path):
    run, tuned, out = tmp_path / "run", tmp_path / "tuned", tmp_path / "out"
    assert compress(any_checkpoint, text, run) == DONE
    assert finetune(run / "bundle", text, tuned) == DONE
    adapter = ["--adapter", str(tuned / "adapter")]
    assert main(["export", "--bundle", str(run / "bundle"), *adapter, "--out", str(out)]) == DONE

    bundle = receive(run / "bundle")
    adapter = load_adapter_for(tuned / "adapter", bundle)
    logits = forward(bundle.config, bundle.emulator.assemble(adapter), IDS)
    config, exported = load_model(out)
    np.testing.assert_allclose(forward(config, exported, IDS), logits, atol=1e-5)
    np.testing.assert_allclose(torch_logits(out), logits, atol=1e-4)


def test_evaluate_measures_models_and_emulators(checkpoint, text, prompts, tmp_path, capsys):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    choices = tmp_path / "choices.jsonl"
    choices.write_text('{"question": "the cat", "choices": ["sat", "ran home"], "answer": 1}\n')
    assert compress(checkpoint, text, run) == DONE
    assert finetune(run / "bundle", prompts, tuned) == DONE
    bundle = ["--bundle", str(run / "bundle")]
    cases = {
        "perplexity": (["--model", str(checkpoint)], text),
        "exact_match": ([*bundle, "--adapter", str(tuned / "adapter")], prompts),
        "accuracy": (bundle, choices),
    }
    for metric, (model, data) in cases.items():
        out = tmp_path / f"{metric}.json"
        code = main(["evaluate", *model, "--data", str(data), "--out", str(out)])
        assert code == DONE, capsys.readouterr().err
        result = json.loads(out.read_text())
        assert np.isfinite(result["metrics"][metric])
        assert result["environment"]["jax"] and len(result["data"]["digest"]) == 64


def test_inspect_tells_what_a_folder_holds(checkpoint, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert compress(checkpoint, text, run) == DONE
    capsys.readouterr()
    for folder in (run / "bundle", checkpoint):
        assert main(["inspect", str(folder)]) == DONE
        assert capsys.readouterr().out.strip()


def test_bundle_and_owner_folders_hold_what_is_theirs(checkpoint, text, tmp_path):
    run = tmp_path / "run"
    assert compress(checkpoint, text, run) == DONE
    assert {path.name for path in (run / "owner").iterdir()} == {
        "plan.json",
        "scores.safetensors",
        "calibration.json",
    }
    shipped = b"".join(path.read_bytes() for path in (run / "bundle").iterdir())
    for secret in (str(tmp_path).encode(), text.name.encode(), b"channels_hessian"):
        assert secret not in shipped


def test_resumed_run_ends_where_an_unbroken_one_does(checkpoint, text, tmp_path):
    run = tmp_path / "run"
    assert compress(checkpoint, text, run) == DONE
    bundle = run / "bundle"
    every = ["--evaluate-every", "2", "--schedule", "constant"]
    assert finetune(bundle, text, tmp_path / "whole", *every) == DONE
    assert finetune(bundle, text, tmp_path / "parts", *every, "--num-steps", "2") == DONE
    assert finetune(bundle, text, tmp_path / "parts", *every, "--resume") == DONE
    whole, parts = (
        (tmp_path / name / "adapter" / "adapter.safetensors").read_bytes()
        for name in ("whole", "parts")
    )
    assert whole == parts


@pytest.fixture
def near(monkeypatch):
    """A search that begins near the best rate of the smallest model, which is far from others'."""
    monkeypatch.setattr(gradot_jax.cli.finetune, "_FIRST_RATES", (0.1, 0.2))


@pytest.mark.usefixtures("near")
def test_a_searched_rate_lies_between_two_and_is_the_run_at_that_rate(
    checkpoint, text, prompts, tmp_path, capsys
):
    run, found = tmp_path / "run", tmp_path / "found"
    assert compress(checkpoint, text, run) == DONE
    rest = ["--validation", str(prompts), "--learning-rate"]
    assert finetune(run / "bundle", prompts, found, *rest, "auto") == DONE
    assert "between two that are no better" in capsys.readouterr().out
    rates = json.loads((found / "rates.json").read_text())
    losses = {float(rate): loss for rate, loss in rates["validation_loss"].items()}
    best = rates["learning_rate"]
    assert rates["bracketed"] and min(losses) < best < max(losses)
    assert losses[best] == min(losses.values())
    lines = map(json.loads, (found / "metrics.jsonl").read_text().splitlines())
    history = [line for line in lines if "learning_rate" in line]
    assert history[0]["learning_rate"] == pytest.approx(best)

    # The same rate asked for is the same run.
    assert finetune(run / "bundle", prompts, tmp_path / "asked", *rest, str(best)) == DONE
    ours, theirs = (
        load_adapter_for(folder / "adapter", receive(run / "bundle"))
        for folder in (found, tmp_path / "asked")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


@pytest.mark.usefixtures("near")
def test_a_search_that_was_stopped_goes_on_with_the_rate_it_was_at(
    checkpoint, text, prompts, tmp_path, monkeypatch, capsys
):
    run, out = tmp_path / "run", tmp_path / "out"
    assert compress(checkpoint, text, run) == DONE
    rest = ["--validation", str(prompts), "--learning-rate", "auto"]
    assert finetune(run / "bundle", prompts, tmp_path / "whole", *rest) == DONE
    train, calls = adapter.train_adapter, []

    def stopped(*args, **settings):
        calls.append(settings["checkpoints"])
        if len(calls) == 2:
            raise Interrupted(signal.SIGTERM, 1)
        return train(*args, **settings)

    monkeypatch.setattr(adapter, "train_adapter", stopped)
    assert finetune(run / "bundle", prompts, out, *rest) == 128 + signal.SIGTERM
    monkeypatch.setattr(adapter, "train_adapter", train)
    assert finetune(run / "bundle", prompts, out, *rest, "--resume") == DONE
    for name in ("rates.json", "adapter/adapter.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_search_without_validation_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(tmp_path, tmp_path / "t.txt", out, "--learning-rate", "auto") == REFUSED
    assert "give --validation" in capsys.readouterr().err
    assert not out.exists()


DRY_RUNS = {
    "gradot": ("0.5", "1 x layer of rank 2, 6 channels", "224 of the middle's 448 (50.0%)"),
    "layer-drop": ("1", "1 x layer of full rank, 12 channels", "448 of the middle's 448 (100.0%)"),
    "crash": ("1", "1 x layer of full rank, 12 channels", "448 of the middle's 448 (100.0%)"),
    "empty": ("0.5", "no layer", "0 of the middle's 448 (0.0%)"),
}


@pytest.mark.parametrize("method", DRY_RUNS)
def test_a_dry_run_says_what_would_be_stored_and_does_nothing(
    checkpoint, text, tmp_path, capsys, method
):
    run, (budget, emulator, kernels) = tmp_path / "run", DRY_RUNS[method]
    asked = ["--method", method, "--budget", budget, "--dry-run"]
    assert compress(checkpoint, text, run, *asked) == DONE
    assert not run.exists()
    printed = capsys.readouterr().out
    for part in (
        "biases and norms",
        "parameters shipped",
        "bundle",
        "host: checkpoint",
        "at the peak",
    ):
        assert part in printed
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["emulator"] == emulator
    assert lines["kernels"].removeprefix("kept").strip() == kernels


def test_a_compression_says_what_memory_it_takes_before_it_starts(
    checkpoint, text, tmp_path, capsys
):
    assert compress(checkpoint, text, tmp_path / "run") == DONE
    said = capsys.readouterr()
    assert "first token of every document and prompt: '</s>' (2)" in said.err
    first, *rest = said.out.splitlines()
    assert re.fullmatch(r"memory: about [\d,]+ MiB( of [\d,]+ MiB available)? on the host", first)
    assert any("to ship" in line for line in rest)


@pytest.mark.parametrize(
    ("method", "budget"), [("gradot", "0.5"), ("magnitude", "0.4"), ("layer-drop", "1")]
)
def test_a_compression_says_how_much_of_the_kernels_it_kept(
    checkpoint, text, tmp_path, capsys, method, budget
):
    run = tmp_path / "run"
    assert compress(checkpoint, text, run, "--method", method, "--budget", budget) == DONE
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept")]
    # Counted in the arrays that were shipped, and in those of the layer behind the adapter.
    stored = unstack_blocks(receive(run / "bundle").emulator.middle)
    original = unstack_blocks(load_model(checkpoint)[1].segments)[1:]
    kept, whole = map(kernel_parameters, (stored, original))
    assert kept <= float(budget) * whole
    assert line == f"kept: {kept / whole:.1%} of the middle's kernels, budget {float(budget):.1%}"


def kernel_parameters(layers):
    return sum(leaf.size for leaf in jax.tree.leaves(layers) if leaf.ndim == 2)


@pytest.mark.parametrize("method", ["layer-drop", "offsite-tuning", "crash"])
def test_a_budget_below_one_layer_is_refused_with_the_least(
    checkpoint, text, tmp_path, capsys, method
):
    assert compress(checkpoint, text, tmp_path / "out", "--method", method) == REFUSED
    error = capsys.readouterr().err
    assert "budget 0.5: less than one of 1 layers, the least is 1" in error
    assert not (tmp_path / "out").exists()


def test_a_compression_that_does_not_fit_is_refused_unless_told_otherwise(
    checkpoint, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(available, "available_host_bytes", lambda: 10 * 2**20)
    assert compress(checkpoint, text, tmp_path / "run") == REFUSED
    message = capsys.readouterr().err
    for option in ("10 MiB", "num-sequences", "batch-size", "sequence-length", "mesh", "dtype"):
        assert option in message
    assert not (tmp_path / "run").exists()
    assert compress(checkpoint, text, tmp_path / "run", "--ignore-memory") == DONE


@pytest.mark.parametrize("method", ["gradot", "magnitude"])
def test_a_half_precision_checkpoint_is_compressed_in_float32_as_it_is(
    checkpoint, text, tmp_path, method
):
    half, runs = tmp_path / "half", (tmp_path / "half run", tmp_path / "full run")
    config, params = load_model(checkpoint, dtype="float16")
    save_model(half, config, params, tokenizer_from=checkpoint)
    full = tmp_path / "full"
    save_model(full, config, load_model(half)[1], tokenizer_from=checkpoint)
    for model, run in zip((half, full), runs, strict=True):
        more = ["--method", method, "--store-dtype", "float32"]
        assert compress(model, text, run, *more) == DONE
    kept = [json.loads((run / "owner" / "plan.json").read_text())["layers"] for run in runs]
    assert kept[0] == kept[1]
    reduced, whole = (receive(run / "bundle") for run in runs)
    assert reduced.manifest.base_digest == whole.manifest.base_digest


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "0"], "budget must lie in (0, 1]"),
        (["--budget", "1.5"], "budget must lie in (0, 1]"),
        (["--num-top", "1"], "leave no middle"),
        (["--sequence-length", "11"], "sequence_length"),
        (["--model", "no/such-model"], "no/such-model"),
    ],
)
def test_refused_options_write_nothing(checkpoint, text, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    assert compress(checkpoint, text, out, *more) == REFUSED
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    *before, refusal = error.strip().splitlines()
    assert refusal.startswith("gradot: error: ") and not any("error" in line for line in before)
    assert not out.exists()


def test_refused_calibration_names_file_and_line(checkpoint, text, tmp_path, capsys):
    short, broken = tmp_path / "short.txt", tmp_path / "broken.jsonl"
    short.write_text("the cat")
    broken.write_text('{"text": "the cat"}\n{"text": \n')
    for file, message in ((short, "shorter than one sequence"), (broken, "line 2")):
        assert compress(checkpoint, file, tmp_path / "out") == REFUSED
        error = capsys.readouterr().err
        assert message in error and file.name in error
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_replaced_only_when_told(checkpoint, text, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert compress(checkpoint, text, out) == REFUSED
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "keep"
    assert compress(checkpoint, text, out, "--overwrite") == DONE
    assert {path.name for path in out.iterdir()} == {"bundle", "owner"}


def test_adapter_of_another_model_is_refused(checkpoint, text, tmp_path, capsys):
    from safetensors.numpy import load_file

    run, tuned, other = tmp_path / "run", tmp_path / "tuned", tmp_path / "other"
    assert compress(checkpoint, text, run) == DONE
    assert finetune(run / "bundle", text, tuned) == DONE
    config, params = load_model(checkpoint)
    shell = params.shell.replace(embed_tokens=params.shell.embed_tokens * 1.01)
    save_model(other, config, params.replace(shell=shell))
    assert load_file(other / "model.safetensors")
    command = ["plug-in", "--model", str(other), "--adapter", str(tuned / "adapter")]
    assert main([*command, "--out", str(tmp_path / "out")]) == REFUSED
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


OWN_ADAPTERS = {
    "crash": ["--budget", "0.75"],
    "scaleot": ["--scaleot.steps", "2", "--scaleot.harmonizer-rank", "2"],
}


@pytest.mark.parametrize("method", OWN_ADAPTERS)
def test_adapter_that_the_method_chose_comes_back_to_its_layers(method, checkpoint, text, tmp_path):
    config = dataclasses.replace(load_model(checkpoint)[0], num_hidden_layers=6)
    deep, run, tuned, out = (tmp_path / name for name in ("deep", "run", "tuned", "out"))
    params = init_params(config, jax.random.key(0), jnp.float16)
    save_model(deep, config, params, tokenizer_from=checkpoint)
    chosen = ["--method", method, "--adapter", "own", "--num-top", "1", *OWN_ADAPTERS[method]]
    assert compress(deep, text, run, *chosen, "--dtype", "bfloat16") == DONE
    assert finetune(run / "bundle", text, tuned) == DONE
    plug_in = ["plug-in", "--model", str(deep), "--adapter", str(tuned / "adapter")]
    assert main([*plug_in, "--owner", str(run / "owner"), "--out", str(out)]) == DONE
    split = receive(run / "bundle").emulator.adapter.split
    (before,), (after,) = params.segments, load_model(out, dtype=None)[1].segments
    moved = [np.any(before.fc1.kernel[i] != after.fc1.kernel[i]) for i in range(6)]
    assert [i for i in range(6) if moved[i]] == list(split.layers(6))


def test_adapter_of_another_bundle_is_refused(checkpoint, text, tmp_path, capsys):
    run, other, tuned = tmp_path / "run", tmp_path / "other", tmp_path / "tuned"
    assert compress(checkpoint, text, run) == DONE
    assert compress(checkpoint, text, other, "--method", "magnitude") == DONE
    assert finetune(other / "bundle", text, tuned) == DONE
    command = ["plug-in", "--model", str(checkpoint), "--adapter", str(tuned / "adapter")]
    where = ["--owner", str(run / "owner"), "--out", str(tmp_path / "out")]
    assert main([*command, *where]) == REFUSED
    assert "tuned in another bundle" in capsys.readouterr().err


def test_debug_shows_the_traceback(checkpoint, text, tmp_path):
    from gradot_jax.errors import InputError

    with pytest.raises(InputError):
        compress(checkpoint, text, tmp_path / "out", "--budget", "2", "--debug")


def test_version_is_told_by_the_program_and_by_the_package(capsys):
    assert main(["--version"]) == DONE
    assert capsys.readouterr().out == f"gradot {gradot_jax.__version__}\n"
    command = [sys.executable, "-m", "gradot_jax", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (DONE, f"gradot {gradot_jax.__version__}\n")


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compress", "--nonsense"])
    assert caught.value.code == USAGE
    capsys.readouterr()


def test_help_imports_neither_jax_nor_numpy():
    code = (
        "import sys; sys.argv = ['gradot', '--help']\n"
        "from gradot_jax.cli.main import program\n"
        "try: program()\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        "heavy = {'jax', 'numpy', 'transformers', 'orbax', 'flax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("demo", "compress", "finetune", "plug-in", "evaluate", "export", "inspect"):
        assert command in result.stdout


def test_a_run_stopped_by_sigterm_exits_with_143(monkeypatch, capsys):
    def stopped(self):
        raise Interrupted(signal.SIGTERM, 3)

    monkeypatch.setattr(Inspect, "run", stopped)
    assert main(["inspect", "."]) == 143
    assert "step 3" in capsys.readouterr().err


def test_steps_must_fill_their_updates(tmp_path, capsys):
    more = ["--num-steps", "5", "--accumulate", "2"]
    assert finetune(tmp_path, tmp_path / "text.txt", tmp_path / "out", *more) == REFUSED
    assert "multiple of accumulate" in capsys.readouterr().err
