"""Configuration of an OPT model, read strictly from a Hugging Face `config.json`."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from gradot_jax.errors import InputError

if TYPE_CHECKING:
    from gradot_jax.models.family import Family

Activation = Literal["relu", "gelu"]

_HF_NAMES = {"remove_final_layer_norm": "_remove_final_layer_norm"}
_LIMIT = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Shape and variant of an OPT model; field names and defaults are Hugging Face's.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        num_hidden_layers: L.
        ffn_dim: F.
        num_attention_heads: H, a divisor of D.
        max_position_embeddings: longest sequence; the table has two rows more.
        word_embed_proj_dim: width of the token embeddings; unlike D there are projections.
        do_layer_norm_before: pre-LN (true) or post-LN (false, as in OPT-350m).
        remove_final_layer_norm: whether a pre-LN model lacks the norm after its last block.
        activation_function: of the MLP.
        enable_bias: whether linear maps have biases.
        layer_norm_elementwise_affine: whether norms have gains and shifts.
        tie_word_embeddings: whether the head is the transposed token embedding.
        init_std: standard deviation of fresh weights.
        pad_token_id: padding.
        bos_token_id: begins every document.
        eos_token_id: ends one.
        source: JSON of the file that it was read from, whose other fields are carried over.
    """

    family: ClassVar["Family"]
    """Set where the family is put together, in `gradot_jax.models.opt`."""
    windows: ClassVar[tuple[None]] = (None,)

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int = 768
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    activation_function: Activation = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    init_std: float = 0.02
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 2
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self) -> None:
        """Checks types, ranges and divisibility; raises InputError."""
        for field in self._read():
            value = getattr(self, field.name)
            kind = type(field.default)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise InputError(
                    f"OPT config: {field.name} must be of type {kind.__name__}, got {value!r}"
                )
            floor = 0 if field.name.endswith("_token_id") else 1
            if kind is int and not floor <= value < _LIMIT:
                raise InputError(f"OPT config: {field.name} = {value} is outside [{floor}, 2^31)")
        if self.activation_function not in get_args(Activation):
            raise InputError(
                f"OPT config: activation_function {self.activation_function!r} is not one of "
                f"{', '.join(get_args(Activation))}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"OPT config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise InputError(
                    f"OPT config: {name} is {getattr(self, name)}, expected a token of the "
                    f"vocabulary of {self.vocab_size}"
                )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Each of them ends a text."""
        return (self.eos_token_id,)

    @property
    def has_projection(self) -> bool:
        """Whether token embeddings are projected to and from the model's width."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a norm stands between the last block and the head."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> "OPTConfig":
        """Reads the fields that shape the model from the contents of a `config.json`.

        Fields that do not shape it (dropout, layerdrop, generation settings) are ignored.

        Raises:
            InputError: for another model type or a value of the wrong type or range.
        """
        model_type = values.get("model_type")
        if model_type != "opt":
            raise InputError(f"{where}: model_type is {model_type!r}, expected 'opt'")
        fields = {}
        for field in cls._read():
            value = values.get(_HF_NAMES.get(field.name, field.name))
            if value is not None:
                fields[field.name] = value
        fields.setdefault("word_embed_proj_dim", fields.get("hidden_size", cls.hidden_size))
        try:
            return cls(**fields, source=json.dumps(values))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads as this model."""
        own = {_HF_NAMES.get(f.name, f.name): getattr(self, f.name) for f in self._read()}
        kind = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}
        return {**json.loads(self.source), **kind, **own}

    @classmethod
    def _read(cls) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(cls) if field.compare]
