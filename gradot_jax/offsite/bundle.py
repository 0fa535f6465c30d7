"""The bundle: the folder with an emulator that goes from the model owner to the data owner."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.compression.plan import EmulatorSpec, Plan
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder
from gradot_jax.files.safetensors import float_dtype
from gradot_jax.files.strict_json import read_json, write_json
from gradot_jax.models.family import ModelConfig, config_identity
from gradot_jax.models.split import AdapterSpec
from gradot_jax.models.tensors import (
    adapter_from_tensors,
    adapter_schema,
    adapter_to_tensors,
    middle_layer_from_tensors,
    middle_prefix,
    middle_schema,
    middle_to_tensors,
    shell_from_tensors,
    shell_schema,
    shell_to_tensors,
)
from gradot_jax.models.weight_files import TOKENIZER_FILES, tokenizer_files
from gradot_jax.offsite.card import bundle_card
from gradot_jax.offsite.emulator import Emulator, build_emulator
from gradot_jax.offsite.manifest import MIXED, BundleManifest
from gradot_jax.offsite.sealed_folder import (
    ADAPTER_FILE,
    CARD,
    CARD_BYTES,
    MANIFEST,
    read_manifest,
    read_stored,
    record_files,
    shipped_digest,
    tensor_file_limit,
    verified_folder,
    write_manifest,
    write_stored,
)

EMULATOR_FILE = "emulator.safetensors"

_TOKENIZER_BYTES = 64 * 2**20
_LOCAL_KEYS = frozenset(
    "_name_or_path auto_map cache_dir local_files_only merges_file name_or_path "
    "special_tokens_map_file token tokenizer_file vocab_file".split()
)
"""Keys of tokenizer settings that name paths of the machine they were saved on, or code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle as received.

    Attributes:
        config: of the full model.
        emulator: the weights.
        tokenizer: of the model; None where none was shipped, or none was asked for.
        manifest: what the bundle says of itself.
        digest: SHA-256 of the manifest, which identifies the bundle.
    """

    config: ModelConfig
    emulator: Emulator
    tokenizer: Any
    manifest: BundleManifest
    digest: str


def ship(
    path: str | Path,
    config: ModelConfig,
    plan: Plan | EmulatorSpec,
    emulator: Emulator,
    *,
    base_digest: str | None = None,
    dtype: DTypeLike | None = None,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
) -> str:
    """Writes a bundle for the data owner; the folder appears whole or not at all.

    Of the plan only `Plan.emulator` leaves the house: no kept index is written.

    Args:
        path: the folder to make, see `output_folder`.
        config: of the full model.
        plan: of the compression, or the part of it that ships.
        emulator: what it yielded; its adapter is that of the original, untuned.
        base_digest: of the original, `sealed_folder.base_digest`; None when the emulator's outer
            blocks and embeddings have its numbers exactly.
        dtype: float32, float16 or bfloat16; None for each array's own.
        tokenizer_from: checkpoint whose tokenizer goes along.
        overwrite: replace an existing folder.

    Returns:
        The bundle's digest.

    Raises:
        InputError: when given anything but an `Emulator`, when arrays, plan and configuration
            disagree or a number is not finite in the stored dtype, or `path` may not be written.
    """
    if not isinstance(emulator, Emulator):
        raise InputError(f"a bundle holds an Emulator, got {type(emulator).__name__}")
    if isinstance(plan, Plan):
        planned = AdapterSpec(plan.num_bottom, plan.num_top, plan.inner)
        if emulator.adapter.split != planned:
            raise InputError(f"the plan has {planned}, the emulator {emulator.adapter.split}")
    # What may leave the house, and nothing else, from here on.
    spec = plan.emulator if isinstance(plan, Plan) else plan
    if spec.layer_map != emulator.layer_map:
        raise InputError(
            f"the plan's layer map is {spec.layer_map}, the emulator's {emulator.layer_map}"
        )
    own = {leaf.dtype if dtype is None else dtype for leaf in jax.tree.leaves(emulator)}
    stored = MIXED if len(own) > 1 else float_dtype(own.pop()).name
    copied = [] if tokenizer_from is None else tokenizer_files(tokenizer_from)

    draft = BundleManifest(
        config=config,
        split=emulator.adapter.split,
        emulator=spec,
        dtype=stored,
        base_digest=base_digest or shipped_digest(config, emulator.shell, emulator.adapter),
        files={},
    )
    # What the reader would refuse is not written.
    draft = BundleManifest.from_values(draft.to_values(), "the bundle to be written")
    if draft.config != config:
        crossed = config_identity(draft.config)
        lost = ", ".join(k for k, v in config_identity(config).items() if crossed[k] != v)
        raise InputError(f"{path}: of the configuration crosses another {lost}; see its fields")
    schemas = _schemas(draft)
    with output_folder(path, overwrite=overwrite) as folder:

        def body() -> Iterator[tuple[str, np.ndarray]]:
            yield from shell_to_tensors(config, emulator.shell)
            yield from middle_to_tensors(emulator.stored_layers(), config, spec.shapes)

        def outer() -> Iterator[tuple[str, np.ndarray]]:
            return adapter_to_tensors(config, emulator.adapter)

        for file, tensors in ((EMULATOR_FILE, body), (ADAPTER_FILE, outer)):
            dtypes = dict.fromkeys(schemas[file], stored)
            if stored == MIXED:
                dtypes |= {name: array.dtype for name, array in tensors()}
            write_stored(folder / file, tensors(), schemas[file], dtypes)
        for file in copied:
            _copy_without_local_keys(file, folder / file.name)
        (folder / CARD).write_text(bundle_card(draft))
        sealed = dataclasses.replace(draft, files=record_files(folder))
        return write_manifest(folder, sealed.to_values())


def receive(
    path: str | Path, *, dtype: DTypeLike | None = None, with_tokenizer: bool = True
) -> Bundle:
    """Reads a bundle, trusting nothing in it.

    Listing, sizes and digests are verified before any file is parsed, and the tensors must be
    exactly those that configuration and shapes ask for.

    Args:
        path: the folder.
        dtype: float32, float16 or bfloat16; None keeps the stored one.
        with_tokenizer: whether to load the tokenizer as well, where there is one.

    Raises:
        InputError: naming the file, and the key or tensor, of the first thing that is not as it
            should be.
    """
    folder = Path(path)
    manifest, digest = read_bundle_manifest(folder)
    config, schemas, tokenizer = manifest.config, _schemas(manifest), None
    with verified_folder(folder, manifest.files, _limits(manifest)):
        _check_tokenizer(folder, manifest)
        outer = read_stored(folder / ADAPTER_FILE, schemas[ADAPTER_FILE], manifest.dtype, dtype)
        adapter = adapter_from_tensors(config, manifest.split, outer)
        del outer
        body = read_stored(folder / EMULATOR_FILE, schemas[EMULATOR_FILE], manifest.dtype, dtype)
        if with_tokenizer and manifest.files.keys() & {"tokenizer.json", "vocab.json"}:
            tokenizer = load_tokenizer(folder)
    layers = [
        middle_layer_from_tensors(config, shape, body, middle_prefix(j))
        for j, shape in enumerate(manifest.emulator.shapes)
    ]
    shell = jax.tree.map(jnp.asarray, shell_from_tensors(config, body))
    emulator = build_emulator(shell, adapter, layers, manifest.emulator.layer_map)
    return Bundle(
        config=config, emulator=emulator, tokenizer=tokenizer, manifest=manifest, digest=digest
    )


def verified_manifest(path: str | Path) -> BundleManifest:
    """The manifest of a bundle whose files are all as it says; no array of them is read.

    Raises:
        InputError: as `receive`, but for what is wrong with the tensors themselves.
    """
    folder = Path(path)
    manifest, _ = read_bundle_manifest(folder)
    with verified_folder(folder, manifest.files, _limits(manifest)):
        _check_tokenizer(folder, manifest)
    return manifest


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
    body = shell_schema(config) | middle_schema(config, manifest.emulator.shapes)
    return {EMULATOR_FILE: body, ADAPTER_FILE: adapter_schema(config, manifest.split)}


def _limits(manifest: BundleManifest) -> dict[str, int]:
    schemas = _schemas(manifest).items()
    tensors = {name: tensor_file_limit(schema, manifest.dtype) for name, schema in schemas}
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
