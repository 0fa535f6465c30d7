"""The README of a bundle and of an adapter, made from the manifest alone."""

from typing import NamedTuple

from gradot_jax.models.split import AdapterSpec
from gradot_jax.models.tensors import (
    adapter_schema,
    count_all,
    middle_schema,
    model_schema,
    shell_schema,
)
from gradot_jax.offsite.manifest import AdapterManifest, BundleManifest


class ParameterCounts(NamedTuple):
    """Numbers of parameters around a bundle.

    Attributes:
        original: of the full model.
        shipped: in the bundle.
        unchanged: embeddings, head and outer blocks, which every emulator ships as they are.
    """

    original: int
    shipped: int
    unchanged: int


def count_parameters(manifest: BundleManifest) -> ParameterCounts:
    """Counts parameters from the shapes that a manifest declares."""
    config = manifest.config
    unchanged = count_all(shell_schema(config) | adapter_schema(config, manifest.split))
    shipped = unchanged + count_all(middle_schema(config, manifest.emulator.shapes))
    return ParameterCounts(count_all(model_schema(config)), shipped, unchanged)


def trained_blocks(split: AdapterSpec) -> str:
    """The blocks of a split in words."""
    ends = f"first {split.num_bottom} and last {split.num_top} blocks"
    return f"{ends} and {', '.join(map(str, split.inner))}" if split.inner else ends


def bundle_card(manifest: BundleManifest) -> str:
    """The README of a bundle: what it is, what it discloses and how to use it."""
    counts, config, split = count_parameters(manifest), manifest.config, manifest.split
    emulator = manifest.emulator
    middle = config.num_hidden_layers - split.num_blocks
    shipped, unchanged = (f"{n / counts.original:.1%}" for n in (counts.shipped, counts.unchanged))
    return f"""\
# Emulator of a language model

An emulator for offsite-tuning: fine-tune its outer blocks on your own text and send back those
blocks alone. The model that they come from, and your text, stay where they are.

| | |
|---|---|
| model | {config.family.describe(config)} |
| trained by you | {trained_blocks(split)} |
| compressed and frozen | the {middle} other blocks, as {len(emulator.shapes)} layers |
| method | {emulator.method} |
| budget | attention {emulator.attention_budget:g}, MLP {emulator.mlp_budget:g} |
| dtype | {manifest.dtype} |
| parameters | {counts.shipped:,}, {shipped} of the original's |
| shipped unchanged | {counts.unchanged:,}, {unchanged} of the original's |

Shipped unchanged are embeddings, final norm, head and outer blocks. In the compressed layers,
norms, biases, kept MLP channels and matrices that stay dense may be exact copies as well. The
privacy of what was left out is an empirical gap in quality, not a proof.

## Use

`gradot_jax.receive` verifies this folder and reads it. Train
`emulator.adapter`, keep `emulator.shell` and `emulator.middle` frozen, and write what goes back
with `gradot_jax.save_adapter`.

The licence of the original model applies.
"""


def adapter_card(manifest: AdapterManifest) -> str:
    """The README of a tuned adapter."""
    config, split = manifest.config, manifest.split
    return f"""\
# Tuned adapter of a language model

The {trained_blocks(split)} of {config.num_hidden_layers}, tuned around an emulator, in
{manifest.dtype}. They replace the same blocks of the original model:
`gradot_jax.load_adapter` reads this folder and `check_adapter` verifies that
it belongs to a model. It holds weights only, and no text, loss or state of the training.
Weights can still reveal something of the text that they were trained on.
"""
