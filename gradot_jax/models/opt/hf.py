"""Hugging Face checkpoints of OPT models, read and written without torch."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder, regular_file
from gradot_jax.files.mapped import StoredTensor
from gradot_jax.files.strict_json import read_json, write_json
from gradot_jax.files.tensors import check_specs, copy_finite, float_dtype, write_tensors
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.names import EMBED_TOKENS, LM_HEAD, model_schema, params_to_hf
from gradot_jax.models.opt.params import Params
from gradot_jax.models.opt.placing import map_params, place_params
from gradot_jax.models.opt.weight_files import (
    WeightFile,
    checkpoint_folder,
    open_weights,
    tokenizer_files,
)
from gradot_jax.parallel import DeviceMesh

MAX_SHARD_BYTES = 5 * 10**9
_CONFIG_BYTES = 2**20


def load_opt(
    path_or_hub_id: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    dtype: str | None = "float32",
    revision: str | None = None,
    memory_map: bool = False,
) -> tuple[OPTConfig, Params]:
    """Loads an OPT checkpoint: safetensors or Flax msgpack, whole or sharded, in that order.

    The files are mapped, not read. Each stacked array of the model is put together on the host
    and placed on its devices before the next is; a process reads only what its devices hold.

    Args:
        path_or_hub_id: a folder, or the id of a repository on the Hugging Face Hub.
        mesh: where to lay the weights; None for the default device.
        dtype: float32, float16 or bfloat16; None keeps that of the file.
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
    values = read_json(regular_file(folder, "config.json"), max_bytes=_CONFIG_BYTES)
    config = OPTConfig.from_hf(values, str(folder / "config.json"))
    tensors = _checked_tensors(str(folder), config, open_weights(folder))
    target = _one_dtype(str(folder), tensors, None if memory_map else dtype)
    if memory_map:
        return config, map_params(config, tensors)
    return config, place_params(config, tensors, target, mesh)


def _checked_tensors(
    where: str, config: OPTConfig, files: list[WeightFile]
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
    schema = model_schema(config)
    if config.tie_word_embeddings and LM_HEAD in tensors:
        schema[LM_HEAD] = (config.vocab_size, config.word_embed_proj_dim)
    check_specs(where, {name: tensor.spec for name, tensor in tensors.items()}, schema)
    if config.tie_word_embeddings and LM_HEAD in tensors:
        _check_same(where, tensors[LM_HEAD], tensors[EMBED_TOKENS])
    return tensors


def _check_same(where: str, head: StoredTensor, embedding: StoredTensor) -> None:
    rows = zip(head.array, embedding.array, strict=True)
    same = all(np.array_equal(one, other) for one, other in rows)
    head.file.release()
    embedding.file.release()
    if not same:
        raise InputError(
            f"{where}: config.json ties the head to the token embedding, but "
            f"{LM_HEAD} differs from it; set tie_word_embeddings to false if it is meant to"
        )


def _one_dtype(where: str, tensors: dict[str, StoredTensor], dtype: str | None) -> np.dtype:
    if dtype is not None:
        return float_dtype(dtype)
    stored = sorted({tensor.dtype.name for tensor in tensors.values()})
    if len(stored) > 1:
        raise InputError(f"{where}: the weights mix {' and '.join(stored)}; choose one dtype")
    return float_dtype(stored[0])


def save_opt(
    path: str | Path,
    config: OPTConfig,
    params: Params,
    *,
    dtype: str | None = None,
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
    stored = (target or params.shell.embed_tokens.dtype).name
    with output_folder(path, overwrite=overwrite) as folder:
        _write_shards(folder, _fitting_tensors(str(path), config, params, target), max_shard_bytes)
        write_json(folder / "config.json", {**config.to_hf(), "dtype": stored})
        tokens = {f"{t}_token_id": getattr(config, f"{t}_token_id") for t in ("bos", "eos", "pad")}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
        for file in copied:
            shutil.copyfile(file, folder / file.name)


def _fitting_tensors(
    where: str, config: OPTConfig, params: Params, dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    schema = model_schema(config)
    for name, array in params_to_hf(params):
        shape = schema.pop(name, None)
        if shape != array.shape:
            raise InputError(
                f"{where}: tensor {name} has shape {array.shape}, the config asks for {shape}"
            )
        stored = np.empty(array.shape, dtype or array.dtype)
        copy_finite(where, name, array, stored)
        yield name, stored
    if schema:
        raise InputError(f"{where}: the weights lack {', '.join(sorted(schema))}")


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
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


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
