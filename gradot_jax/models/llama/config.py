"""Configuration of a Llama-type model, read strictly from a Hugging Face `config.json`."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.models.config_values import ConfigValues
from gradot_jax.models.family import attention_windows
from gradot_jax.nn.rotary import RopeType, Rotary, frequencies

if TYPE_CHECKING:
    from gradot_jax.models.family import Family

ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
}
_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, **_MISTRAL, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}
"""What a field that a file lacks means."""

_MAX_LAYERS, _MAX_HEAD_DIM = 4096, 65536
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_CHANGEABLE = (*_SIZES, "num_attention_heads", "num_key_value_heads", "head_dim")
_CHANGEABLE += ("tie_word_embeddings", "initializer_range")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and variant of a Llama, Mistral, Qwen2 or Qwen3 model; to be had by `from_hf`.

    Attributes:
        model_type: which of the four.
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_hidden_layers: L.
        num_attention_heads: H, heads of queries.
        num_key_value_heads: G, heads of keys and values; a divisor of H.
        head_dim: K.
        max_position_embeddings: longest sequence; with a dynamic rotary embedding its `factor`
            times the file's.
        rotary: the rotary embedding.
        windows: tokens that attention sees at most, in each layer, or one number for all; None for
            no bound.
        rms_norm_eps: of all norms.
        attention_bias: of a Llama or Qwen3, whether the attention maps have biases.
        mlp_bias: of a Llama, whether the MLP's have.
        tie_word_embeddings: whether the head is the transposed token embedding.
        initializer_range: standard deviation of fresh weights.
        bos_token_id: of a text, or None.
        end_token_ids: each of them ends a text.
        source: JSON of the file that it was read from, whose other fields are carried over.
    """

    family: ClassVar["Family"]
    """Set where the family is put together, in `gradot_jax.models.llama`."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rotary: Rotary
    windows: tuple[int | None, ...]
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int | None
    end_token_ids: tuple[int, ...]
    source: str = dataclasses.field(compare=False, repr=False)

    @property
    def max_cached_positions(self) -> int:
        """See `models.decode.longest_cached`."""
        dynamic, whole = self.rotary.rope_type == "dynamic", self.max_position_embeddings
        return self.rotary.original_max_position_embeddings if dynamic else whole

    @property
    def qkv_bias(self) -> bool:
        """Whether the maps to queries, keys and values have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> "LlamaConfig":
        """Reads the fields that shape the model from the contents of a `config.json`.

        Raises:
            InputError: for a value of the wrong type or range, or a variant that is not read.
        """
        model_type = values["model_type"]
        read = ConfigValues({**_DEFAULTS[model_type], **values}, f"{where}: {model_type} config")
        read.expect("architectures", None, [f"{model_type.capitalize()}ForCausalLM"])
        read.expect("hidden_act", "silu")
        read.expect("quantization_config", None)
        read.expect("partial_rotary_factor", None, 1)
        sizes = {name: read.whole(name) for name in _SIZES}
        heads = read.whole("num_attention_heads")
        size = read.whole("head_dim", sizes["hidden_size"] // heads)
        if read.values.get("head_dim") is None and sizes["hidden_size"] % heads:
            raise read.refused("hidden_size", f"a multiple of num_attention_heads {heads}")
        if sizes["num_hidden_layers"] > _MAX_LAYERS:
            raise read.refused("num_hidden_layers", f"at most {_MAX_LAYERS}")
        groups = read.whole("num_key_value_heads", heads)
        if heads % groups:
            raise read.refused("num_attention_heads", f"a multiple of num_key_value_heads {groups}")
        if size % 2 or size > _MAX_HEAD_DIM:
            raise read.refused("head_dim", f"an even number of at most {_MAX_HEAD_DIM}")
        bos, ends = read.whole("bos_token_id", None, least=0), read.tokens("eos_token_id")
        for name, ids in (("bos_token_id", [bos or 0]), ("eos_token_id", ends)):
            if max(ids, default=0) >= sizes["vocab_size"]:
                raise read.refused(name, f"a token of the vocabulary of {sizes['vocab_size']}")
        length = read.whole("max_position_embeddings")
        rotary = _read_rotary(read, size, length)
        with np.errstate(all="ignore"):
            if not np.isfinite(frequencies(rotary, length)).all():
                raise read.refused("rope_parameters", "a rotary embedding of finite frequencies")
        stretched = rotary.factor if rotary.rope_type == "dynamic" else 1
        biases = model_type in ("llama", "qwen3")
        return cls(
            model_type=model_type,
            **sizes,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=size,
            max_position_embeddings=int(length * stretched),
            rotary=rotary,
            windows=_read_windows(read, model_type, sizes["num_hidden_layers"]),
            rms_norm_eps=read.number("rms_norm_eps"),
            attention_bias=biases and read.flag("attention_bias"),
            mlp_bias=model_type == "llama" and read.flag("mlp_bias"),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            initializer_range=read.number("initializer_range"),
            bos_token_id=bos,
            end_token_ids=ends,
            source=json.dumps(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads as this model.

        All fields are those of the file that was read, but for sizes that were replaced since.

        Raises:
            InputError: where anything else was replaced.
        """
        attention_windows(self, self.num_hidden_layers)
        values = json.loads(self.source)
        before = type(self).from_hf(values)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.compare and value != getattr(before, field.name):
                if field.name not in _CHANGEABLE:
                    raise InputError(f"{field.name} of a configuration cannot be replaced")
                values[field.name] = value
        if isinstance(values.get("layer_types"), list):
            kinds = values["layer_types"]
            same = len(kinds) == self.num_hidden_layers
            values["layer_types"] = kinds if same else kinds[:1] * self.num_hidden_layers
        return values


def _read_windows(read: ConfigValues, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Of each layer, or one for all."""
    full, sliding = "full_attention", "sliding_attention"
    qwen, window, first = model_type in ("qwen2", "qwen3"), None, 0
    if model_type == "mistral" or (qwen and read.flag("use_sliding_window")):
        window = read.whole("sliding_window", None)
    if qwen:
        first = read.whole("max_window_layers", 0, least=0)
    kinds = [full if window is None or layer < first else sliding for layer in range(layers)]
    given = read.values.get("layer_types")
    if given is not None and given != kinds:
        known = (full, sliding) if window else (full,)
        each = isinstance(given, list) and len(given) == layers
        if not qwen or not each or not all(kind in known for kind in given):
            raise read.refused(
                "layer_types", f"{layers} of {' or '.join(sorted({*kinds, *known}))}"
            )
        kinds = given
    windows = tuple(window if kind == sliding else None for kind in kinds)
    return windows[:1] if len({*windows}) == 1 else windows


def _read_rotary(read: ConfigValues, head_dim: int, length: int) -> Rotary:
    """Both forms: `rope_parameters`, or `rope_theta` and `rope_scaling` beside each other."""
    chosen = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    params = read.values.get(chosen) or {}
    if not isinstance(params, dict) or any(isinstance(v, dict) for v in params.values()):
        raise read.refused(chosen, "an object of numbers and words, the same for all layers")
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in get_args(RopeType):
        raise read.refused(chosen, f"a rope_type of {', '.join(get_args(RopeType))}")
    theta = {"rope_theta": read.values.get("rope_theta")}
    rope = ConfigValues({**theta, **params}, f"{read.where}: {chosen}")
    rope.expect("partial_rotary_factor", None, 1)
    rotary = Rotary(head_dim, length, kind, rope.number("rope_theta"))
    if rotary.rope_theta <= 1:
        raise rope.refused("rope_theta", "a number above 1")
    if kind == "default":
        return rotary
    if kind in ("llama3", "yarn"):
        named = read.whole("original_max_position_embeddings", None)
        length = named or rope.whole("original_max_position_embeddings", length)
    ratio = rotary.original_max_position_embeddings / length
    factor = rope.number("factor", ratio) if kind == "yarn" else rope.number("factor")
    if factor < 1 or (kind == "dynamic" and length * factor >= 2**31):
        raise rope.refused("factor", "at least 1, of a dynamic one no more than 2^31 tokens' worth")
    if kind == "dynamic" and head_dim == 2:
        raise read.refused("head_dim", "more than 2 where rope_type is dynamic")
    rotary = rotary._replace(original_max_position_embeddings=length, factor=factor)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.refused("low_freq_factor", f"less than high_freq_factor {high}")
        return rotary._replace(low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return rotary._replace(
            attention_factor=_attention_factor(rope, factor),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", True),
        )
    return rotary


def _attention_factor(rope: ConfigValues, factor: float) -> float:
    """YaRN's, which may be given, or as two scales whose ratio it is."""
    scales = [rope.values.get(name) and rope.number(name) for name in ("mscale", "mscale_all_dim")]
    over, under = (0.1 * (scale or 0) * math.log(factor) + 1 for scale in scales)
    default = over / under if all(scales) else 0.1 * math.log(factor) + 1
    return rope.number("attention_factor", default)
