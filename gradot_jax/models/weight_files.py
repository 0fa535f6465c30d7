"""Where a checkpoint keeps its weights: folders, the Hugging Face Hub, formats and shards.

Every format is read into the same form, torch's names and layout, so that what loads a model
does not know where the tensors came from. Only safetensors and the msgpack files of Hugging Face
Flax are read; the pickles of torch can run code, and the HDF5 files of TensorFlow are not ours.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gradot_jax.errors import InputError
from gradot_jax.files.folder import regular_file
from gradot_jax.files.mapped import StoredTensor, map_flax, map_safetensors
from gradot_jax.files.strict_json import read_json

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json merges.txt added_tokens.json "
    "chat_template.jinja special_tokens_map.json generation_config.json"
).split()
"""Files beside the weights that go with a model wherever it goes; all of them data, no code."""

CanonicalName = Callable[[str], str | None]
"""`Family.canonical_name`."""

_INDEX_BYTES = 64 * 2**20
_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


class WeightFile(NamedTuple):
    """One file of weights, mapped into memory.

    Attributes:
        path: the file.
        tensors: each as torch names and lays it out.
    """

    path: Path
    tensors: list[StoredTensor]


class _Format(NamedTuple):
    whole: str
    shards: str
    tensors: Callable[[Path], list[StoredTensor]]
    name: Callable[[str], str]


def checkpoint_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local one, or a snapshot downloaded to the Hub's cache.

    Of a repository with several formats only the first one that is read here is downloaded. The
    Hub's settings for cache, token and offline use apply; without a network the cache serves.

    Args:
        path_or_hub_id: a folder, or, given as a string that is no folder, a repository's id.
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: when there is no such folder, or the repository cannot be had.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{path}: a local folder has no revision, got {revision!r}")
        return path
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or path.exists() or not _HUB_ID.fullmatch(name):
        raise InputError(f"{path}: there is no such folder")
    folder = path
    for form in FORMATS:
        for weights in (form.whole, form.shards):
            patterns = ["config.json", "*.index.json", *TOKENIZER_FILES, weights]
            folder = _snapshot(name, revision, patterns)
            if _present(folder, form):
                return folder
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns
        )
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{name}{at} is neither a folder here nor to be had from the Hugging Face Hub or its "
            f"cache: {' '.join(str(error).split())}"
        ) from error
    return Path(snapshot)


def hub_file(hub_id: str, suffix: str, name: str | None, revision: str | None = None) -> Path:
    """One file of a repository on the Hugging Face Hub, downloaded to its cache or found there.

    Args:
        hub_id: of the repository.
        suffix: of the names that are looked for.
        name: of the file; may be left out where only one has the suffix.
        revision: branch, tag or commit.

    Raises:
        InputError: when the repository cannot be had, or the file is none of it.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise InputError(f"{hub_id}: there is no such file or folder")
    found = [name] if name else _hub_names(hub_id, suffix, revision)
    if len(found) != 1:
        raise InputError(
            f"{hub_id}: expected one file *{suffix}, or the name of one of several; found "
            f"{', '.join(found) or 'none'}"
        )
    folder = _snapshot(hub_id, revision, found)
    if not (folder / found[0]).is_file():
        raise InputError(f"{hub_id}: there is no file {found[0]!r} in this repository")
    return folder / found[0]


def _hub_names(hub_id: str, suffix: str, revision: str | None) -> list[str]:
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(hub_id, revision=revision)
    except Exception:  # Whatever it is, without a network the cache may serve.
        folder = _snapshot(hub_id, revision, [f"*{suffix}"])
        names = [str(path.relative_to(folder)) for path in folder.rglob(f"*{suffix}")]
    return sorted(name for name in names if name.endswith(suffix))


def _present(folder: Path, form: _Format) -> bool:
    sharded = os.path.lexists(folder / _index(form)) and any(folder.glob(form.shards))
    return os.path.lexists(folder / form.whole) or sharded


def _index(form: _Format) -> str:
    return f"{form.whole}.index.json"


def open_weights(folder: Path, canonical: CanonicalName) -> list[WeightFile]:
    """Opens the weights of a checkpoint: one file, or the shards that its index names.

    Raises:
        InputError: when there are no weights in a format read here, or a file is missing, damaged
            or outside the folder, or does not hold what the index says.
    """
    for form in FORMATS:
        if os.path.lexists(folder / form.whole):
            return [_open(form, regular_file(folder, form.whole), canonical)]
        if os.path.lexists(folder / _index(form)):
            return _open_shards(folder, form, canonical)
    wanted = ", ".join(f"{form.whole} or {_index(form)}" for form in FORMATS)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise InputError(
        f"{folder}: no weights found; expected {wanted}, found {found}. Weights in "
        "pytorch_model.bin (a pickle, which can run code) or tf_model.h5 are not read; convert "
        "them, where torch is installed, with these two lines of Python:\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "    [kind.from_pretrained('SOURCE').save_pretrained('TARGET') "
        "for kind in (AutoModelForCausalLM, AutoTokenizer)]"
    )


def _open_shards(folder: Path, form: _Format, canonical: CanonicalName) -> list[WeightFile]:
    index = regular_file(folder, _index(form))
    listed = read_json(index, max_bytes=_INDEX_BYTES).get("weight_map")
    named = isinstance(listed, dict) and all(isinstance(name, str) for name in listed.values())
    if not named or not listed:
        raise InputError(f"{index}: expected a weight_map from tensor names to file names")
    shards = {name: regular_file(folder, name) for name in sorted({*listed.values()})}
    files = {name: _open(form, path, canonical) for name, path in shards.items()}
    expected = {(canonical(form.name(tensor)), shard) for tensor, shard in listed.items()}
    expected = {(name, shard) for name, shard in expected if name is not None}
    held = {(tensor.name, shard) for shard, file in files.items() for tensor in file.tensors}
    if expected != held:
        differing = ", ".join(f"{tensor} in {shard}" for tensor, shard in sorted(expected ^ held))
        raise InputError(f"{index}: index and shards disagree about {differing}")
    return list(files.values())


def _open(form: _Format, path: Path, canonical: CanonicalName) -> WeightFile:
    named = [(canonical(tensor.name), tensor) for tensor in form.tensors(path)]
    kept = [dataclasses.replace(tensor, name=name) for name, tensor in named if name is not None]
    return WeightFile(path, kept)


def _flax_name(path: str) -> str:
    """Torch's name of a tensor of Hugging Face Flax, given by its `/`-joined path."""
    parent, _, leaf = path.replace("/", ".").rpartition(".")
    return f"{parent}.{_FLAX_LEAVES.get(leaf, leaf)}"


def _flax_tensors(path: Path) -> list[StoredTensor]:
    def as_torch(tensor: StoredTensor) -> StoredTensor:
        # Torch stores the kernels of Flax the other way round.
        stored = tensor.T if tensor.name.rpartition("/")[2] == "kernel" else tensor
        return dataclasses.replace(stored, name=_flax_name(tensor.name))

    return [as_torch(tensor) for tensor in map_flax(path)]


FORMATS = (
    _Format("model.safetensors", "model-*.safetensors", map_safetensors, str),
    _Format("flax_model.msgpack", "flax_model-*.msgpack", _flax_tensors, _flax_name),
)
"""In the order in which they are looked for."""


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer and generation files of a checkpoint, those of `TOKENIZER_FILES` it has.

    Raises:
        InputError: when there is no tokenizer among them, or one leads out of the folder.
    """
    folder = Path(folder)
    present = [name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= {*present}:
        raise InputError(f"{folder}: no tokenizer; expected tokenizer.json or vocab and merges")
    return [regular_file(folder, name) for name in present]
