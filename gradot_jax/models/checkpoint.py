"""Hugging Face checkpoints, read and written without torch.

What is read goes one stacked array at a time from the file over the host to its devices, so that
the host holds one of them beside what the devices share with it; or it stays in the file.
"""

import dataclasses
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder, regular_file
from gradot_jax.files.mapped import StoredTensor
from gradot_jax.files.pages import release_pages
from gradot_jax.files.safetensors import check_specs, fitting_tensors, float_dtype, write_tensors
from gradot_jax.files.strict_json import read_json, write_json
from gradot_jax.models.config_values import ConfigValues
from gradot_jax.models.families import read_config
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.partition import param_shardings
from gradot_jax.models.tensors import (
    block_from_tensors,
    layer_prefix,
    model_schema,
    params_to_tensors,
    shell_from_tensors,
)
from gradot_jax.models.weight_files import (
    WeightFile,
    checkpoint_folder,
    open_weights,
    tokenizer_files,
)
from gradot_jax.parallel import DeviceMesh

MAX_SHARD_BYTES = 5 * 10**9
_CONFIG_BYTES = 2**20

_ALIGNMENT = 64
"""Bytes; JAX uses the memory of a numpy array on CPUs as it is if it begins at a multiple."""

Index = tuple[slice, ...]


def load_model(
    path_or_hub_id: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    dtype: DTypeLike | None = "float32",
    revision: str | None = None,
    memory_map: bool = False,
) -> tuple[ModelConfig, Params]:
    """Loads a checkpoint: safetensors or Flax msgpack, whole or sharded, in that order.

    The family is read from its `config.json`.

    The files are mapped, not read. Each stacked array of the model is put together on the host
    and placed on its devices before the next is; a process reads only what its devices hold.

    Args:
        path_or_hub_id: a folder, or the id of a repository on the Hugging Face Hub.
        mesh: where to lay the weights; None for the default device.
        dtype: float32, float16 or bfloat16; None keeps that of each tensor, or where layers differ
            in it the least that holds all.
        revision: branch, tag or commit on the Hub.
        memory_map: leave the weights in the file, in its dtype. The arrays are read-only numpy
            views of it and every block is a segment of its own; `mesh` and `dtype` play no part.

    Returns:
        The configuration and the weights, all blocks in one segment unless memory-mapped.

    Raises:
        InputError: when the checkpoint is absent, damaged, of another architecture, lacks or
            has more tensors than the configuration asks for, or holds numbers not finite.
    """
    folder = checkpoint_folder(path_or_hub_id, revision)
    config = load_config(folder)
    files = open_weights(folder, config.family.canonical_name)
    tensors = _checked_tensors(str(folder), config, files)
    if memory_map:
        return config, _map_params(config, tensors)
    target = None if dtype is None else float_dtype(dtype)
    return config, _place_params(config, tensors, target, mesh)


def load_config(folder: Path) -> ModelConfig:
    """The configuration in a checkpoint's folder, of whatever family.

    Raises:
        InputError: when there is none, or it is of a family that is not read.
    """
    file = regular_file(folder, "config.json")
    return read_config(read_json(file, max_bytes=_CONFIG_BYTES), str(file))


def end_tokens(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Each of them ends a text that is generated: `generation_config.json`'s, or else the model's.

    Raises:
        InputError: when that file cannot be read, or names a token outside the vocabulary.
    """
    if not os.path.lexists(folder / "generation_config.json"):
        return config.end_token_ids
    file = regular_file(folder, "generation_config.json")
    values = ConfigValues(read_json(file, max_bytes=_CONFIG_BYTES), str(file))
    ends = values.tokens("eos_token_id") or config.end_token_ids
    if max(ends, default=0) >= config.vocab_size:
        raise values.refused("eos_token_id", f"tokens of the vocabulary of {config.vocab_size}")
    return ends


def _checked_tensors(
    where: str, config: ModelConfig, files: list[WeightFile]
) -> dict[str, StoredTensor]:
    stored = [tensor for file in files for tensor in file.tensors]
    tensors = {tensor.name: tensor for tensor in stored}
    if len(tensors) != len(stored):
        counts = Counter(tensor.name for tensor in stored)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        raise InputError(f"{where}: stored more than once: {', '.join(repeated)}")
    if config.num_hidden_layers > len(tensors):
        raise InputError(
            f"{where}: config.json says {config.num_hidden_layers} layers, the weights are only "
            f"{len(tensors)} tensors"
        )
    schema, paths = model_schema(config), config.family.shell_paths
    head, embedding = (f"{paths[field]}.weight" for field in ("lm_head", "embed_tokens"))
    tied = config.tie_word_embeddings and head in tensors
    if tied:
        schema[head] = schema[embedding]
    check_specs(where, {name: tensor.spec for name, tensor in tensors.items()}, schema)
    if tied:
        _check_same(where, tensors[head], tensors[embedding])
    return tensors


def _check_same(where: str, head: StoredTensor, embedding: StoredTensor) -> None:
    rows = zip(head.array, embedding.array, strict=True)
    same = all(np.array_equal(one, other) for one, other in rows)
    release_pages([*head.pieces, *embedding.pieces])
    if not same:
        raise InputError(
            f"{where}: config.json ties the head to the token embedding, but "
            f"{head.name} differs from it; set tie_word_embeddings to false if it is meant to"
        )


def save_model(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint that transformers loads unchanged.

    The folder appears whole or not at all, see `output_folder`.

    Args:
        path: the folder to make.
        config: must describe `params`.
        params: dense blocks of full size; low-rank maps are multiplied back.
        dtype: float32, float16 or bfloat16; None keeps that of the arrays.
        tokenizer_from: checkpoint whose tokenizer files are copied byte for byte.
        overwrite: replace an existing folder.
        max_shard_bytes: weights beyond it go to several files and an index.

    Raises:
        InputError: when `config` and `params` disagree, a weight is not finite or out of the
            dtype's range, `path` may not be written, or there is no tokenizer to copy.
    """
    copied = [] if tokenizer_from is None else tokenizer_files(tokenizer_from)
    target = None if dtype is None else float_dtype(dtype)
    if params.num_layers != config.num_hidden_layers:
        raise InputError(
            f"{path}: the config says {config.num_hidden_layers} layers, the weights have "
            f"{params.num_layers}"
        )
    own, values = {leaf.dtype for leaf in jax.tree.leaves(params)}, config.to_hf()
    stored = (target or jnp.result_type(*own)).name
    if target is None and len(own) > 1:
        # What the original's file says of its mixture.
        stored = values.get("dtype") or values.get("torch_dtype") or stored
    schema = model_schema(config)
    dtypes = {} if target is None else dict.fromkeys(schema, target)
    tensors = fitting_tensors(str(path), params_to_tensors(config, params), schema, dtypes)
    with output_folder(path, overwrite=overwrite) as folder:
        _write_shards(folder, tensors, max_shard_bytes)
        named = dict.fromkeys({"dtype", *({"torch_dtype"} & values.keys())}, stored)
        write_json(folder / "config.json", {**values, **named})
        ends = config.end_token_ids
        tokens = {"bos_token_id": config.bos_token_id, "pad_token_id": values.get("pad_token_id")}
        tokens["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
        for file in copied:
            shutil.copyfile(file, folder / file.name)


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    parts: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        write_tensors(folder / f"part-{len(parts)}", shard, {"format": "pt"})
        parts.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        # Lets go of this shard before the next one is gathered.
        shard.clear()
    name_shards(folder, parts, total)


def name_shards(folder: Path, parts: Sequence[Sequence[str]], total_bytes: int) -> list[Path]:
    """Gives the files `part-0`, `part-1` and so on their names, and several an index.

    Args:
        folder: where they are.
        parts: the names of the tensors in each.
        total_bytes: of all tensors.

    Returns:
        The files, in the order of the parts.
    """
    if len(parts) == 1:
        return [(folder / "part-0").rename(folder / "model.safetensors")]
    weight_map, files = {}, []
    for number, names in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        files.append((folder / f"part-{number}").rename(folder / name))
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return files


def _shards(
    tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    """An array to be placed: a stored tensor, or those of all layers along a leading axis."""

    tensors: tuple[StoredTensor, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        single = self.tensors[0].shape
        return (len(self.tensors), *single) if self.stacked else single

    @property
    def dtype(self) -> np.dtype:
        """The least that holds every tensor exactly."""
        return jnp.result_type(*{tensor.dtype for tensor in self.tensors})

    def read(self, dtype: np.dtype, index: Index) -> np.ndarray:
        layers, rest = (index[0], index[1:]) if self.stacked else (slice(None), index)
        tensors = self.tensors[layers]
        shape = tuple(
            len(range(*part.indices(size)))
            for part, size in zip(rest, tensors[0].shape, strict=True)
        )
        target = _aligned((len(tensors), *shape), dtype)
        for tensor, rows in zip(tensors, target, strict=True):
            tensor.read_into(rows, rest)
        # JAX may use this very memory.
        target.flags.writeable = False
        return target if self.stacked else target[0]


def _map_params(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> Params:
    """The weights as read-only views of the file; every block is a segment of depth one."""

    def view(leaf: _Leaf) -> np.ndarray:
        (tensor,) = leaf.tensors
        tensor.check_finite()
        return tensor.array[None] if leaf.stacked else tensor.array

    shell, blocks = _layers(config, tensors)
    singles = tuple(jax.tree.map(lambda t: _Leaf((t,), True), block) for block in blocks)
    return jax.tree.map(view, Params(shell, singles))


def _place_params(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: np.dtype | None,
    mesh: DeviceMesh | None = None,
) -> Params:
    """The weights on their devices, in a dtype or each its own; all blocks in one segment."""
    shell, blocks = _layers(config, tensors)
    stack = jax.tree.map(lambda *layers: _Leaf(layers, True), *blocks)
    leaves = Params(shell, (stack,))
    if mesh is None:
        return jax.tree.map(partial(_place, dtype), leaves)
    return jax.tree.map(partial(_place, dtype), leaves, param_shardings(leaves, mesh))


def _layers(config: ModelConfig, tensors: Mapping[str, StoredTensor]):
    shell = jax.tree.map(lambda t: _Leaf((t,), False), shell_from_tensors(config, tensors))
    layers = range(config.num_hidden_layers)
    return shell, [block_from_tensors(config, tensors, layer_prefix(config, i)) for i in layers]


def _place(dtype: np.dtype | None, leaf: _Leaf, sharding: jax.sharding.Sharding | None = None):
    dtype = leaf.dtype if dtype is None else dtype
    if sharding is None:
        placed = jax.device_put(leaf.read(dtype, (slice(None),) * len(leaf.shape)))
    else:
        parts: dict[tuple, np.ndarray] = {}

        # Devices along the batch ask for the same part.
        def part(index: Index) -> np.ndarray:
            key = tuple((i.start, i.stop) for i in index)
            if key not in parts:
                parts[key] = leaf.read(dtype, index)
            return parts[key]

        placed = jax.make_array_from_callback(leaf.shape, sharding, part)
    # The host's copy is gone before the next array is read.
    return placed.block_until_ready()


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
