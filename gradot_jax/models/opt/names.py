"""Hugging Face tensor names of an OPT model, and the two ways between them and our trees.

Torch stores linear weights as `[D_out, D_in]`; our kernels are `[D_in, D_out]`. Everything here
is on the host, one block at a time.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import SITES, Block, Params, Shell, depth, get_block
from gradot_jax.nn.linear import Dense, dense_kernel
from gradot_jax.nn.norm import LayerNorm

DECODER = "model.decoder."
EMBED_TOKENS = f"{DECODER}embed_tokens.weight"
LM_HEAD = "lm_head.weight"

# Parameters are declared as JAX arrays; until they are placed they may be anything that has a `T`.
Tensors = Mapping[str, Any]

_NORMS = ("self_attn_layer_norm", "final_layer_norm")
_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def layer_prefix(index: int) -> str:
    """Prefix of the tensors of one layer."""
    return f"{DECODER}layers.{index}."


def _site_prefix(site: str) -> str:
    return f"self_attn.{site}." if site.endswith("_proj") else f"{site}."


def canonical_name(name: str) -> str:
    """The full name of a tensor that some checkpoints store without the leading `model.`."""
    return f"model.{name}" if name.startswith("decoder.") else name


def flax_name(path: str) -> str:
    """Torch's name of a tensor of Hugging Face Flax, given by its `/`-joined path."""
    parent, _, leaf = path.replace("/", ".").rpartition(".")
    return canonical_name(f"{parent}.{_FLAX_LEAVES.get(leaf, leaf)}")


def is_flax_kernel(path: str) -> bool:
    """Whether torch stores a tensor of Hugging Face Flax the other way round."""
    return path.rpartition("/")[2] == "kernel"


def block_schema(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Torch shapes of a dense block's tensors, by name without the layer prefix."""
    width, ffn = config.hidden_size, config.ffn_dim
    schema: dict[str, tuple[int, ...]] = {}
    for site in SITES:
        d_in, d_out = {"fc1": (width, ffn), "fc2": (ffn, width)}.get(site, (width, width))
        schema[_site_prefix(site) + "weight"] = (d_out, d_in)
        if config.enable_bias:
            schema[_site_prefix(site) + "bias"] = (d_out,)
    if config.layer_norm_elementwise_affine:
        for norm in _NORMS:
            schema |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return schema


def shell_schema(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Torch shapes of the tensors outside the blocks, by full name."""
    width, embed = config.hidden_size, config.word_embed_proj_dim
    schema: dict[str, tuple[int, ...]] = {
        EMBED_TOKENS: (config.vocab_size, embed),
        f"{DECODER}embed_positions.weight": (config.max_position_embeddings + 2, width),
    }
    if config.has_projection:
        schema[f"{DECODER}project_in.weight"] = (width, embed)
        schema[f"{DECODER}project_out.weight"] = (embed, width)
    if config.has_final_layer_norm and config.layer_norm_elementwise_affine:
        schema[f"{DECODER}final_layer_norm.weight"] = (width,)
        schema[f"{DECODER}final_layer_norm.bias"] = (width,)
    if not config.tie_word_embeddings:
        schema[LM_HEAD] = (config.vocab_size, embed)
    return schema


def model_schema(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Torch shapes of every tensor of a checkpoint, by full name."""
    schema = shell_schema(config)
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        schema |= {prefix + name: shape for name, shape in block_schema(config).items()}
    return schema


def params_to_hf(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a model as torch stores it, by full name, one at a time.

    Of numpy parameters the tensors are views, so that writing to them fills the parameters.
    """
    yield from shell_to_hf(params.shell)
    layer = 0
    for stack in params.segments:
        for index in range(depth(stack)):
            for name, array in block_to_hf(get_block(stack, index)):
                yield layer_prefix(layer) + name, array
            layer += 1


def block_to_hf(block: Block) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of one block as torch stores them, factors multiplied back, without prefix."""
    for site in SITES:
        weights = getattr(block, site)
        yield _site_prefix(site) + "weight", np.asarray(dense_kernel(weights)).T
        if weights.bias is not None:
            yield _site_prefix(site) + "bias", np.asarray(weights.bias)
    for name in _NORMS:
        yield from _norm_to_hf(name, getattr(block, name))


def shell_to_hf(shell: Shell) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors outside the blocks as torch stores them, by full name."""
    yield EMBED_TOKENS, np.asarray(shell.embed_tokens)
    yield f"{DECODER}embed_positions.weight", np.asarray(shell.embed_positions)
    for name in ("project_in", "project_out"):
        projection = getattr(shell, name)
        if projection is not None:
            yield f"{DECODER}{name}.weight", np.asarray(projection.kernel).T
    if shell.final_layer_norm is not None:
        yield from _norm_to_hf(f"{DECODER}final_layer_norm", shell.final_layer_norm)
    if shell.lm_head is not None:
        yield LM_HEAD, np.asarray(shell.lm_head).T


def _norm_to_hf(name: str, norm: LayerNorm) -> Iterator[tuple[str, np.ndarray]]:
    if norm.scale is not None:
        yield f"{name}.weight", np.asarray(norm.scale)
    if norm.bias is not None:
        yield f"{name}.bias", np.asarray(norm.bias)


def block_from_hf(config: OPTConfig, tensors: Tensors, prefix: str) -> Block:
    """One dense block from torch tensors `prefix + name` that fit `block_schema`."""

    def dense(site: str) -> Dense:
        name = prefix + _site_prefix(site)
        bias = tensors[name + "bias"] if config.enable_bias else None
        return Dense(tensors[name + "weight"].T, bias)

    parts: dict[str, Any] = {site: dense(site) for site in SITES}
    parts |= {name: _norm_from_hf(config, tensors, prefix + name) for name in _NORMS}
    return Block(**parts)


def shell_from_hf(config: OPTConfig, tensors: Tensors) -> Shell:
    """The shell from torch tensors that fit `shell_schema`."""

    def projection(name: str) -> Dense | None:
        if not config.has_projection:
            return None
        return Dense(tensors[f"{DECODER}{name}.weight"].T, None)

    final = None
    if config.has_final_layer_norm:
        final = _norm_from_hf(config, tensors, f"{DECODER}final_layer_norm")
    return Shell(
        embed_tokens=tensors[EMBED_TOKENS],
        embed_positions=tensors[f"{DECODER}embed_positions.weight"],
        project_in=projection("project_in"),
        project_out=projection("project_out"),
        final_layer_norm=final,
        lm_head=None if config.tie_word_embeddings else tensors[LM_HEAD].T,
    )


def _norm_from_hf(config: OPTConfig, tensors: Tensors, name: str) -> LayerNorm:
    if not config.layer_norm_elementwise_affine:
        return LayerNorm(None, None)
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"])
