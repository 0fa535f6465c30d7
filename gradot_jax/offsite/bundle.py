"""The bundle: the folder with an emulator that goes from the model owner to the data owner."""

import dataclasses
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder
from gradot_jax.files.strict_json import read_json, write_json
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import shell_from_hf, shell_schema, shell_to_hf
from gradot_jax.models.opt.weight_files import TOKENIZER_FILES, tokenizer_files
from gradot_jax.offsite.card import bundle_card
from gradot_jax.offsite.digest import shipped_digest
from gradot_jax.offsite.emulator import Emulator, build_emulator
from gradot_jax.offsite.manifest import BundleManifest
from gradot_jax.offsite.names import (
    adapter_from_tensors,
    adapter_schema,
    adapter_to_tensors,
    middle_layer_from_tensors,
    middle_prefix,
    middle_schema,
    middle_to_tensors,
)
from gradot_jax.offsite.sealed_folder import (
    CARD,
    CARD_BYTES,
    MANIFEST,
    read_manifest,
    read_stored,
    record_files,
    tensor_file_limit,
    verified_folder,
    write_manifest,
    write_stored,
)

EMULATOR_FILE = "emulator.safetensors"
ADAPTER_FILE = "adapter.safetensors"

_TOKENIZER_BYTES = 64 * 2**20
_LOCAL_KEYS = {
    "_name_or_path",
    "auto_map",
    "cache_dir",
    "local_files_only",
    "merges_file",
    "name_or_path",
    "special_tokens_map_file",
    "token",
    "tokenizer_file",
    "vocab_file",
}
"""Keys of tokenizer settings that name paths of the machine they were saved on, or code."""


class Bundle(NamedTuple):
    """A bundle as read.

    Attributes:
        config: of the full model.
        emulator: the weights.
        manifest: what the bundle says of itself.
        digest: SHA-256 of the manifest, which identifies the bundle.
    """

    config: OPTConfig
    emulator: Emulator
    manifest: BundleManifest
    digest: str


def save_bundle(
    path: str | Path,
    config: OPTConfig,
    emulator: Emulator,
    *,
    method: str,
    attention_budget: float,
    mlp_budget: float,
    shapes: tuple[LayerShape | HarmonizerShape, ...],
    base_digest: str | None = None,
    dtype: str | None = None,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
) -> str:
    """Writes a bundle; the folder appears whole or not at all, see `output_folder`.

    Of a `Plan` it takes only what may leave the house: no kept index is accepted.

    Args:
        path: the folder to make.
        config: of the full model.
        emulator: its adapter is that of the original, untuned.
        method: name of the compression method.
        attention_budget: share of the middle's attention parameters asked for, in (0, 1].
        mlp_budget: share of the middle's MLP parameters asked for, in (0, 1].
        shapes: true sizes of the compressed layers, `Plan.shapes`.
        base_digest: of the original, `offsite.digest.base_digest`; None when the emulator's outer
            blocks and embeddings have its numbers exactly.
        dtype: float32, float16 or bfloat16; None for the least that holds every array exactly.
        tokenizer_from: checkpoint whose tokenizer goes along.
        overwrite: replace an existing folder.

    Returns:
        The bundle's digest.

    Raises:
        InputError: when given anything but an `Emulator`, when arrays, shapes and configuration
            disagree or a number is not finite in the stored dtype, or `path` may not be written.
    """
    if not isinstance(emulator, Emulator):
        raise InputError(f"a bundle holds an Emulator, got {type(emulator).__name__}")
    stored = dtype or jnp.result_type(*jax.tree.leaves(emulator)).name
    copied = [] if tokenizer_from is None else tokenizer_files(tokenizer_from)

    draft = BundleManifest(
        config=config,
        spec=emulator.adapter.spec,
        method=method,
        attention_budget=attention_budget,
        mlp_budget=mlp_budget,
        shapes=shapes,
        layer_map=emulator.layer_map,
        dtype=stored,
        base_digest=base_digest or shipped_digest(config, emulator.shell, emulator.adapter),
        files={},
    )
    # What the reader would refuse is not written.
    draft = BundleManifest.from_values(draft.to_values(), "the bundle to be written")
    schemas = _schemas(draft)
    with output_folder(path, overwrite=overwrite) as folder:
        middle = middle_to_tensors(emulator.iterate_stored(), shapes)
        body = chain(shell_to_hf(emulator.shell), middle)
        write_stored(folder / EMULATOR_FILE, body, schemas[EMULATOR_FILE], stored)
        outer = adapter_to_tensors(config, emulator.adapter)
        write_stored(folder / ADAPTER_FILE, outer, schemas[ADAPTER_FILE], stored)
        for file in copied:
            _copy_without_local_keys(file, folder / file.name)
        (folder / CARD).write_text(bundle_card(draft))
        sealed = dataclasses.replace(draft, files=record_files(folder))
        return write_manifest(folder, sealed.to_values())


def load_bundle(path: str | Path, *, dtype: str | None = None) -> Bundle:
    """Reads a bundle, trusting nothing in it.

    Listing, sizes and digests are verified before any file is parsed, and the tensors must be
    exactly those that configuration and shapes ask for.

    Args:
        path: the folder.
        dtype: float32, float16 or bfloat16; None keeps the stored one.

    Raises:
        InputError: naming the file, and the key or tensor, of the first thing that is not as it
            should be.
    """
    folder = Path(path)
    manifest, digest = read_bundle_manifest(folder)
    schemas = _schemas(manifest)
    with verified_folder(folder, manifest.files, _limits(manifest)):
        _check_tokenizer(folder, manifest)
        outer = read_stored(folder / ADAPTER_FILE, schemas[ADAPTER_FILE], manifest.dtype, dtype)
        adapter = adapter_from_tensors(manifest.config, manifest.spec, outer)
        del outer
        body = read_stored(folder / EMULATOR_FILE, schemas[EMULATOR_FILE], manifest.dtype, dtype)
    config = manifest.config
    layers = [
        middle_layer_from_tensors(config, shape, body, middle_prefix(j))
        for j, shape in enumerate(manifest.shapes)
    ]
    shell = jax.tree.map(jnp.asarray, shell_from_hf(config, body))
    emulator = build_emulator(shell, adapter, layers, manifest.layer_map)
    return Bundle(config, emulator, manifest, digest)


def read_bundle_manifest(folder: Path) -> tuple[BundleManifest, str]:
    """A bundle's manifest and its SHA-256, the bundle's digest; no other file is looked at.

    Raises:
        InputError: when there is no valid manifest of a bundle.
    """
    values, digest = read_manifest(folder)
    manifest = BundleManifest.from_values(values, str(folder / MANIFEST))
    missing = sorted({EMULATOR_FILE, ADAPTER_FILE, CARD} - set(manifest.files))
    if missing:
        raise InputError(f"{folder / MANIFEST}: does not list {', '.join(missing)}")
    return manifest, digest


def _schemas(manifest: BundleManifest) -> dict[str, dict[str, tuple[int, ...]]]:
    config = manifest.config
    body = shell_schema(config) | middle_schema(config, manifest.shapes)
    return {EMULATOR_FILE: body, ADAPTER_FILE: adapter_schema(config, manifest.spec)}


def _limits(manifest: BundleManifest) -> dict[str, int]:
    itemsize = jnp.dtype(manifest.dtype).itemsize
    tensors = {name: tensor_file_limit(s, itemsize) for name, s in _schemas(manifest).items()}
    return {**dict.fromkeys(TOKENIZER_FILES, _TOKENIZER_BYTES), CARD: CARD_BYTES, **tensors}


def _copy_without_local_keys(source: Path, target: Path) -> None:
    if not source.name.endswith("_config.json"):
        target.write_bytes(source.read_bytes())
        return
    values = read_json(source)
    write_json(target, {k: v for k, v in values.items() if k not in _LOCAL_KEYS})


def _check_tokenizer(folder: Path, manifest: BundleManifest) -> None:
    for name in manifest.files:
        if name.endswith("_config.json"):
            found = sorted(_LOCAL_KEYS & set(read_json(folder / name)))
            if found:
                raise InputError(f"{folder / name}: a bundle's tokenizer has no {', '.join(found)}")
