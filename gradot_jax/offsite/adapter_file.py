"""The tuned adapter: the folder that goes back from the data owner to the model owner.

It holds weights and what they belong to. Nothing of the training enters: `save_adapter` is given
no data, no loss and no optimiser state, so it cannot leak one.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder
from gradot_jax.files.safetensors import float_dtype
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params, unstack_blocks
from gradot_jax.models.split import Adapter, AdapterSpec, adapter_of
from gradot_jax.models.tensors import adapter_from_tensors, adapter_schema, adapter_to_tensors
from gradot_jax.offsite.card import adapter_card
from gradot_jax.offsite.manifest import AdapterManifest, crossing_values
from gradot_jax.offsite.sealed_folder import (
    ADAPTER_FILE,
    CARD,
    CARD_BYTES,
    MANIFEST,
    base_digest,
    read_manifest,
    read_stored,
    record_files,
    tensor_file_limit,
    verified_folder,
    write_manifest,
    write_stored,
)

if TYPE_CHECKING:
    from gradot_jax.offsite.bundle import Bundle


class BlockChange(NamedTuple):
    """How far tuning moved one block.

    Attributes:
        layer: index in the full model.
        relative: `||new - old|| / ||old||`, Euclidean over all of the block's parameters.
        largest: greatest absolute change of a parameter.
    """

    layer: int
    relative: float
    largest: float


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    bundle: "Bundle",
    *,
    dtype: DTypeLike = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a tuned adapter; the folder appears whole or not at all, see `output_folder`.

    Args:
        path: the folder to make.
        adapter: the tuned blocks.
        bundle: the bundle that they were tuned in.
        dtype: float32, float16 or bfloat16.
        overwrite: replace an existing folder.

    Raises:
        InputError: when the adapter does not fit the bundle, a number is not finite in the dtype,
            or `path` may not be written.
    """
    config, split, stored = bundle.config, bundle.manifest.split, float_dtype(dtype).name
    if adapter.split != split:
        raise InputError(f"the adapter has {adapter.split}, the bundle {split}")

    draft = AdapterManifest(
        config=config,
        split=split,
        dtype=stored,
        base_digest=bundle.manifest.base_digest,
        emulator_digest=bundle.digest,
        files={},
    )
    draft = AdapterManifest.from_values(draft.to_values(), "the adapter to be written")
    with output_folder(path, overwrite=overwrite) as folder:
        tensors = adapter_to_tensors(config, adapter)
        schema = adapter_schema(config, split)
        write_stored(folder / ADAPTER_FILE, tensors, schema, dict.fromkeys(schema, stored))
        (folder / CARD).write_text(adapter_card(draft))
        sealed = dataclasses.replace(draft, files=record_files(folder))
        write_manifest(folder, sealed.to_values())


def load_adapter(
    path: str | Path, config: ModelConfig, *, dtype: DTypeLike | None = None
) -> tuple[Adapter, AdapterManifest]:
    """Reads a tuned adapter for a model, trusting nothing in it.

    Args:
        path: the folder.
        config: of the model owner's model; the tensors must be those that it asks for.
        dtype: float32, float16 or bfloat16; None keeps the stored one.

    Returns:
        The adapter, and the manifest for `check_adapter`.

    Raises:
        InputError: naming the file, and the key or tensor, of the first thing that is not as it
            should be.
    """
    folder = Path(path)
    manifest = read_adapter_manifest(folder)
    _check_config(manifest, config, str(folder / MANIFEST))
    schema = adapter_schema(config, manifest.split)
    size = tensor_file_limit(schema, manifest.dtype)
    with verified_folder(folder, manifest.files, {ADAPTER_FILE: size, CARD: CARD_BYTES}):
        tensors = read_stored(folder / ADAPTER_FILE, schema, manifest.dtype, dtype)
    return adapter_from_tensors(config, manifest.split, tensors), manifest


def load_adapter_for(
    path: str | Path, bundle: "Bundle", *, dtype: DTypeLike | None = None
) -> Adapter:
    """Reads an adapter that was tuned in this bundle, to run it there.

    Raises:
        InputError: as `load_adapter`, and when the adapter was tuned in another bundle.
    """
    adapter, manifest = load_adapter(path, bundle.config, dtype=dtype)
    _check_emulator(manifest, bundle.digest, str(path))
    return adapter


def read_adapter_manifest(folder: Path) -> AdapterManifest:
    """An adapter's manifest; no other file is looked at.

    Raises:
        InputError: when there is no valid manifest of an adapter.
    """
    values, _ = read_manifest(folder)
    manifest = AdapterManifest.from_values(values, str(folder / MANIFEST))
    if set(manifest.files) != {ADAPTER_FILE, CARD}:
        raise InputError(
            f"{folder / MANIFEST}: lists {sorted(manifest.files)}, an adapter has exactly "
            f"{ADAPTER_FILE} and {CARD}"
        )
    return manifest


def check_adapter(
    manifest: AdapterManifest,
    config: ModelConfig,
    params: Params,
    *,
    split: AdapterSpec | None = None,
    emulator_digest: str | None = None,
) -> None:
    """Refuses an adapter that was not tuned for this model.

    Args:
        manifest: of the adapter.
        config: of the model owner's model.
        params: the model owner's full model.
        split: the one that was shipped; None accepts any that this model fits.
        emulator_digest: the digest of the bundle that was shipped, when only that one will do.

    Raises:
        InputError: naming what differs: configuration, split, weights or bundle.
    """
    _check_config(manifest, config, "adapter")
    if split is not None and split != manifest.split:
        raise InputError(f"adapter: belongs to another split, {manifest.split}, expected {split}")
    if base_digest(config, params, manifest.split) != manifest.base_digest:
        raise InputError(
            "adapter: belongs to another model: configuration and split agree, but embeddings or "
            "outer blocks of the model that it was tuned from have other weights"
        )
    if emulator_digest is not None:
        _check_emulator(manifest, emulator_digest, "adapter")


def adapter_report(config: ModelConfig, params: Params, adapter: Adapter) -> list[BlockChange]:
    """How far each tuned block is from the original's, for the owner to judge before plug-in."""
    pairs = zip(
        adapter.split.layers(config.num_hidden_layers),
        unstack_blocks(adapter_of(params, adapter.split).stacks),
        unstack_blocks(adapter.stacks),
        strict=True,
    )
    return [_change(layer, old, new) for layer, old, new in pairs]


def _change(layer: int, old, new) -> BlockChange:
    before = _flat(old)
    moved = _flat(new) - before
    norm = float(np.linalg.norm(before))
    relative = float(np.linalg.norm(moved)) / norm if norm else float("inf")
    return BlockChange(layer, relative, float(np.abs(moved).max()))


def _flat(block) -> np.ndarray:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(block)])


def _check_config(manifest: AdapterManifest, config: ModelConfig, where: str) -> None:
    if manifest.config == config:
        return
    got, expected = manifest.config.to_hf(), crossing_values(config.to_hf())
    differing = [
        f"{k} is {got.get(k)!r:.80}, expected {expected.get(k)!r:.80}"
        for k in sorted(got | expected)
        if got.get(k) != expected.get(k)
    ]
    raise InputError(f"{where}: belongs to another model: {'; '.join(differing[:8])}")


def _check_emulator(manifest: AdapterManifest, digest: str, where: str) -> None:
    if manifest.emulator_digest != digest:
        raise InputError(
            f"{where}: was tuned in another bundle, {manifest.emulator_digest[:12]}, expected "
            f"{digest[:12]}"
        )
