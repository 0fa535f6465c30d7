"""A GGUF file as a Hugging Face checkpoint: its configuration and its weights.

llama.cpp turns neighbouring features of a head where Hugging Face turns those half a head apart,
and stores the rows of q and k of `llama` files in its order; they are put back.
"""

import math
import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from gradot_jax.errors import InputError
from gradot_jax.files.folder import regular_file
from gradot_jax.files.gguf_file import GGUFFile, GGUFTensor
from gradot_jax.files.mapped import map_safetensors
from gradot_jax.files.pages import release_pages
from gradot_jax.files.safetensors import TensorSpec, check_specs, float_dtype, stream_tensors
from gradot_jax.files.strict_json import write_json
from gradot_jax.models.checkpoint import MAX_SHARD_BYTES, name_shards
from gradot_jax.models.families import read_config
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.tensors import model_schema
from gradot_jax.models.weight_files import hub_file
from gradot_jax.nn.rotary import Rotary, frequencies
from gradot_jax.progress import track

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture` that are read, which are Hugging Face's model types too."""

_SHELL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
"""What llama.cpp calls a part, by Hugging Face's name."""

_TURNED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_STRETCHED = "rope_freqs.weight"
_LLAMA3_LENGTH = 8192
"""Tokens that every Llama 3 was first trained on; files do not say it."""

_NEUTRAL = {
    "attention.causal": (bool, True),
    "attention.sliding_window": (int, 0),
    "expert_count": (int, 0),
    "expert_used_count": (int, 0),
    "rope.scale_linear": (float, 1.0),
    "tensor_data_layout": (str, "Meta AI original pth"),
}
"""What a key must say if it is there, because a checkpoint of these families says nothing else."""


def find_gguf(path_or_hub_id: str, name: str | None = None, revision: str | None = None) -> Path:
    """The GGUF file that a user names.

    Args:
        path_or_hub_id: a file, a folder, or the id of a repository on the Hugging Face Hub.
        name: of the file in the folder or repository; may be left out where it holds only one.
        revision: branch, tag or commit on the Hub.

    Raises:
        InputError: when there is no such file, or several and no name.
    """
    path = Path(path_or_hub_id)
    if os.path.lexists(path) and revision is not None:
        raise InputError(f"{path}: a local file has no revision, got {revision!r}")
    if path.is_file():
        if name is not None:
            raise InputError(f"{path}: is a file; a name goes with a folder, got {name!r}")
        return path
    if not path.is_dir():
        return hub_file(path_or_hub_id, ".gguf", name, revision)
    found = sorted(file.name for file in path.glob("*.gguf"))
    if name is None and len(found) != 1:
        raise InputError(
            f"{path}: expected one GGUF file, or the name of one of several; found "
            f"{', '.join(found) or 'none'}"
        )
    return regular_file(path, name or found[0])


def write_config(folder: Path, file: GGUFFile, dtype: DTypeLike = "float32") -> ModelConfig:
    """Writes `config.json` and `generation_config.json` of a GGUF file.

    Args:
        folder: exists.
        file: of an architecture in `ARCHITECTURES`.
        dtype: of the weights: float32, float16 or bfloat16.

    Returns:
        The configuration as it is read again.

    Raises:
        InputError: when the file is of another architecture, or has metadata or tensors that a
            checkpoint of it has not, or lacks some.
    """
    values = {**_config_values(file), "dtype": float_dtype(dtype).name}
    config = read_config(values, str(file.path))
    _sources(file, config)
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", _generation(file, values))
    return config


def write_weights(
    folder: Path,
    file: GGUFFile,
    config: ModelConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the weights of a GGUF file beside its configuration.

    One tensor is in memory at a time. What was written is read again and compared bit for bit with
    what the file says. In float32 every weight is exact; float16 and bfloat16 round.

    Args:
        folder: exists.
        file: see `open_gguf`.
        config: what `write_config` gave.
        max_shard_bytes: weights beyond it go to several files and an index.

    Raises:
        InputError: when a number is not finite, or out of the dtype's range.
        OSError: when a file cannot be written or reads back differently.
    """
    values, sources = config.to_hf(), _sources(file, config)
    dtype = float_dtype(values["dtype"])
    specs = {name: TensorSpec(tensor.shape, dtype.name) for name, tensor in sources.items()}
    sizes = {name: math.prod(spec.shape) * dtype.itemsize for name, spec in specs.items()}
    parts = _parts(sizes, max_shard_bytes)
    arrays = (
        (name, _hf_array(values, name, tensor))
        for name, tensor in track(sources.items(), "tensors written")
    )
    for number, names in enumerate(parts):
        announced = {name: specs[name] for name in names}
        part = islice(arrays, len(names))
        stream_tensors(folder / f"part-{number}", announced, part, {"format": "pt"})
    written = name_shards(folder, parts, sum(sizes.values()))
    stored = [tensor for path in written for tensor in map_safetensors(path)]
    bits = f"u{dtype.itemsize}"
    for tensor in track(stored, "tensors compared"):
        expected = _hf_array(values, tensor.name, sources[tensor.name])
        if not np.array_equal(tensor.array.view(bits), expected.view(bits)):
            raise OSError(f"{tensor.path}: {tensor.name} differs from what {file.path} says")
        release_pages(tensor.pieces)


def _config_values(file: GGUFFile) -> dict[str, Any]:
    """The contents of a `config.json`, but for the dtype."""
    model_type = file.get("general.architecture", str)
    if model_type not in ARCHITECTURES:
        raise file.refused("general.architecture", " or ".join(ARCHITECTURES))
    if file.get("general.type", str, "model") != "model":
        raise file.refused("general.type", "model")
    own = partial(_own, file, model_type)
    for name, (kind, neutral) in _NEUTRAL.items():
        if own(name, kind, neutral) != neutral:
            raise file.refused(f"{model_type}.{name}", f"{neutral} or none")
    vocabulary = len(file.get("tokenizer.ggml.tokens", list))
    width, heads = own("embedding_length", int), own("attention.head_count", int)
    length, size = own("context_length", int), own("attention.key_length", int, 0)
    size = size or width // max(heads, 1)
    same = {"vocab_size": vocabulary, "attention.value_length": size, "rope.dimension_count": size}
    for name, expected in same.items():
        if own(name, int, expected) != expected:
            raise file.refused(f"{model_type}.{name}", f"{expected} as elsewhere in the file")
    values = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": own("feed_forward_length", int),
        "num_hidden_layers": own("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", int, heads),
        "head_dim": size,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon", float),
        "rope_theta": own("rope.freq_base", float, 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{name}_token_id": file.get(f"tokenizer.ggml.{key}_token_id", int, None)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    }
    if model_type != "qwen2":
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if model_type == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    values["rope_scaling"] = _rope_scaling(file, values)
    file.check_read(f"{model_type}.")
    return values


def _own(file: GGUFFile, model_type: str, name: str, kind: type, *default: Any) -> Any:
    return file.get(f"{model_type}.{name}", kind, *default)


def _rope_scaling(file: GGUFFile, values: dict[str, Any]) -> dict[str, Any] | None:
    own = partial(_own, file, values["model_type"])
    kind = own("rope.scaling.type", str, "none")
    length = own("rope.scaling.original_context_length", int, None)
    own("rope.scaling.finetuned", bool, False)
    if values["model_type"] == "llama" and _STRETCHED in file.tensors and kind == "none":
        return _llama3(file, values, length or _LLAMA3_LENGTH)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise file.refused(f"{values['model_type']}.rope.scaling.type", "none, linear or yarn")
    scaling = {"rope_type": kind, "factor": own("rope.scaling.factor", float)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = length or values["max_position_embeddings"]
        for name, plain in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            scaling[name] = own(f"rope.scaling.yarn_{name}", float, plain)
    return scaling


def _llama3(file: GGUFFile, values: dict[str, Any], length: int) -> dict[str, Any]:
    """What each plane's frequency is divided by, as the formula that Llama 3 has for it."""
    tensor, size = file.tensors[_STRETCHED], values["head_dim"]
    if tensor.shape != (size / 2,):
        raise InputError(f"{file.path}: {_STRETCHED} has the shape {tensor.shape}, not {size} / 2")
    divisors = tensor.read("float32")
    plain = Rotary(size, length, rope_theta=values["rope_theta"])
    rotary = plain._replace(rope_type="llama3", factor=float(divisors.max()))
    with np.errstate(all="ignore"):
        ratio = frequencies(plain, length) / frequencies(rotary, length)
    if not np.allclose(ratio, divisors, rtol=1e-5, atol=0):
        raise InputError(
            f"{file.path}: {_STRETCHED} is not what Llama 3 stretches its rotary embedding by, "
            f"from {length} tokens on"
        )
    return {
        "rope_type": "llama3",
        "factor": rotary.factor,
        "low_freq_factor": rotary.low_freq_factor,
        "high_freq_factor": rotary.high_freq_factor,
        "original_max_position_embeddings": length,
    }


def _generation(file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
    more = (file.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eot", "eom"))
    ends = [end for end in dict.fromkeys([values["eos_token_id"], *more]) if end is not None]
    tokens = {name: values[name] for name in ("bos_token_id", "pad_token_id")}
    tokens["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    return {name: value for name, value in tokens.items() if value is not None}


def _sources(file: GGUFFile, config: ModelConfig) -> dict[str, GGUFTensor]:
    """The tensor in the file of each of a checkpoint, which must be all that it holds."""
    schema = model_schema(config)
    names = {name: _gguf_name(name) for name in schema}
    held = {name: TensorSpec(tensor.shape, "float32") for name, tensor in file.tensors.items()}
    scaling = config.to_hf()["rope_scaling"]
    if scaling and scaling["rope_type"] == "llama3":
        held.pop(_STRETCHED)
    check_specs(str(file.path), held, {names[name]: shape for name, shape in schema.items()})
    return {name: file.tensors[own] for name, own in names.items()}


def _gguf_name(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if path in _SHELL:
        return f"{_SHELL[path]}.{leaf}"
    _, _, layer, site = path.split(".", 3)
    return f"blk.{layer}.{_BLOCK[site]}.{leaf}"


def _hf_array(values: dict[str, Any], name: str, tensor: GGUFTensor) -> np.ndarray:
    array = tensor.read(float_dtype(values["dtype"]))
    site = name.split(".")[-2]
    if values["model_type"] != "llama" or site not in _TURNED:
        return array
    heads = values[_TURNED[site]]
    pairs = array.reshape(heads, len(array) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _parts(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    parts, room = [], 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(name)
        room -= size
    return parts
