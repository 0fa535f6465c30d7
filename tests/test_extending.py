"""docs/EXTENDING.md to the letter: its files are put into a copy of the package, and used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradot_jax

PACKAGE = Path(gradot_jax.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "EXTENDING.md").read_text()
BLOCKS = [
    block.split("\n", 1) for block in re.findall(r"^```python\n# (.*?)\n```$", TEXT, re.M | re.S)
]

USE_METHOD = """
import dataclasses, json, sys
import numpy as np
import gradot_jax as gj
from gradot_jax.cli.main import main
from gradot_jax.offsite.owner import load_plan

model, text, out = sys.argv[1:]
common = ["compress", "--method", "outgoing", "--model", model, "--calibration", text]
common += ["--num-bottom", "1", "--num-top", "14", "--sequence-length", "32", "--out", out]
assert main([*common, "--dry-run"]) == 0
assert main([*common, "--budget", "0.5", "--num-sequences", "8"]) == 0
(layer,) = load_plan(f"{out}/owner").layers
config, params = gj.load_model(model)
kernel = np.asarray(params.segments[0].fc2.kernel[1])
kept = np.sort(np.argsort(-np.abs(kernel).sum(1), kind="stable")[: len(layer.channels)])
assert list(layer.channels) == kept.tolist() and 0 < len(kept) < len(kernel)
assert all(indices == tuple(range(len(indices))) for _, indices in layer.components)
assert main([*common, "--fisher", "mc", "--overwrite"]) == 3
print("used")
"""

USE_FAMILY = """
import sys
import jax, jax.numpy as jnp, numpy as np
import gradot_jax as gj
from gradot_jax.compression.budget import channel_pool, rank_pool
from gradot_jax.memory.forecast import forecast, kernel_parameters
from gradot_jax.models.toy.config import ToyConfig

folder = sys.argv[1]
config = ToyConfig()
gj.save_model(f"{folder}/model", config, gj.init_params(config, jax.random.key(0)))
config, params = gj.load_model(f"{folder}/model")
assert type(config) is ToyConfig and config.family.label == "toy"

rng = np.random.default_rng(0)
def batch(size):
    ids = rng.integers(0, config.vocab_size, (size, 9))
    ones = np.ones((size, 8), np.float32)
    return gj.Batch(*map(jnp.asarray, (ids[:, :-1], ids[:, 1:], ones, ones)))
batches = [batch(4), batch(4)]
split = gj.AdapterSpec(1, 1)
narrow, wide, ffn = rank_pool(12, 6), rank_pool(12, 12), channel_pool(20, 36)
middle = 4 * (2 * narrow.whole + 2 * wide.whole + ffn.whole)

for method in ("gradot", "layer-drop"):
    options = {"budget": 0.55}
    plan, emulator = gj.compress(config, params, split, batches, method=method, **options)
    kept, whole = kernel_parameters(config, plan)
    assert whole == middle and kept <= options["budget"] * middle, (method, kept, whole)
    gj.ship(f"{folder}/{method}", config, plan, emulator)
    bundle = gj.receive(f"{folder}/{method}")
    optimizer = gj.make_optimizer(learning_rate=1e-2, num_steps=1)
    adapter = gj.finetune_adapter(
        bundle.config, bundle.emulator, batches, optimizer, num_steps=1)
    gj.save_adapter(f"{folder}/{method}-adapter", adapter, bundle)
    returned, manifest = gj.load_adapter(f"{folder}/{method}-adapter", config)
    gj.check_adapter(manifest, config, params)
    tuned = gj.plug_in(params, returned)
    untouched = [i for i in range(6) if i not in returned.split.layers(6)]
    for new, old in zip(jax.tree.leaves(tuned.segments), jax.tree.leaves(params.segments)):
        assert np.array_equal(new[np.array(untouched)], old[np.array(untouched)])
    dense, weights = gj.export_params(config, bundle.emulator.assemble())
    gj.save_model(f"{folder}/{method}-dense", dense, weights)
    dense, weights = gj.load_model(f"{folder}/{method}-dense")
    ids = batches[0].input_ids
    exported = gj.forward(dense, weights, ids)
    own = gj.forward(config, bundle.emulator.assemble(), ids)
    np.testing.assert_allclose(exported, own, atol=1e-5 * float(jnp.abs(own).max()))

job = gj.Completion([3, 4], max_tokens=5, end_ids=(), detokenize=str)
gj.complete(config, params, [job], batch_size=1)
assert len(job.ids) == 7
for place in range(2, 7):
    before = np.array([job.ids[:place]])
    assert int(gj.forward(config, params, before)[0, -1].argmax()) == job.ids[place]

# Each kernel has its own price: uniform counts are exact, global ones fill the budget.
plan, _ = gj.compress(config, params, split, batches, method="gradot", budget=0.55)
for layer in plan.layers:
    sizes = {site: len(indices) for site, indices in layer.components}
    assert sizes["k_proj"] == narrow.within(0.55 * 72)
    assert sizes["q_proj"] == wide.within(0.55 * 144)
    assert len(layer.channels) == 11
assert forecast(config, split, gj.CompressionOptions(budget=0.55)).kept_kernels == sum(
    4 * part for part in (2 * 18 * sizes["k_proj"], 2 * 24 * sizes["q_proj"], 36 * 11))
plan, _ = gj.compress(config, params, split, batches, method="gradot-global", budget=0.55)
kept, _ = kernel_parameters(config, plan)
assert 0.55 * middle - 24 - 36 < kept <= 0.55 * middle
print("used")
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the package with every file and entry of the text in its place."""
    root = tmp_path_factory.mktemp("extended")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, root / "gradot_jax", ignore=ignored)
    for where, code in BLOCKS:
        path, _, how = where.partition(": ")
        file = root / path
        if how == "in _ALL":
            text = file.read_text().replace("\n_ALL = (\n", f"\n_ALL = (\n{code}\n")
        elif how == "instead of FAMILIES":
            text = re.sub(r"^FAMILIES = .*$", code, file.read_text(), flags=re.M)
        elif file.exists():
            text = file.read_text().replace("\nSCORED = {", f"\n{code}\n\n\nSCORED = {{")
        else:
            file.parent.mkdir(exist_ok=True)
            text = code
        file.write_text(text)
    return root


def use(root: Path, code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_ENABLE_X64": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_text_has_the_files_that_it_speaks_of():
    places = [where.partition(": ")[0].removeprefix("gradot_jax/") for where, _ in BLOCKS]
    assert places == [
        "methods/outgoing.py",
        "methods/table.py",
        "methods/table.py",
        "models/toy/config.py",
        "models/toy/block.py",
        "models/toy/__init__.py",
        "models/families.py",
    ]


def test_a_method_of_one_file_works_from_the_command_line(extended, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the adapter is tuned around the emulator and goes back to the owner. " * 60)
    model = PACKAGE / "demo" / "tiny_opt"
    assert use(extended, USE_METHOD, model, text, tmp_path / "out").endswith("used\n")


def test_a_family_of_one_folder_goes_through_every_method(extended, tmp_path):
    assert use(extended, USE_FAMILY, tmp_path).endswith("used\n")
