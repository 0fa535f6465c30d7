"""Rotary position embeddings (Su et al. 2021) and the ways in which they are stretched.

Features i and i + K/2 of a head are a plane, turned by the angle `position * frequency_i`. With
`theta^(-2i/K)` as frequency, position by position, long sequences are had by

    linear    frequency / factor
    dynamic   theta * (factor T / P - factor + 1)^(K / (K - 2)) for theta where T > P
    llama3    / factor at wavelengths beyond P / low_freq_factor, as it is below
              P / high_freq_factor, between them interpolated
    yarn      / factor at features that turn less than `beta_slow` times in P tokens, as it is where
              they turn more than `beta_fast` times, between them interpolated (Peng et al. 2023)

with P the tokens of the sequences trained on first.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


class Rotary(NamedTuple):
    """A rotary embedding; names are Hugging Face's.

    Attributes:
        head_dim: K.
        original_max_position_embeddings: P.
        rope_type: how it is stretched.
        rope_theta: the base.
        factor: by how much.
        low_freq_factor: of llama3.
        high_freq_factor: of llama3.
        attention_factor: what cosine and sine are multiplied by, of yarn.
        beta_fast: of yarn.
        beta_slow: of yarn.
        truncate: whether the features that yarn interpolates between are rounded to whole ones.
    """

    head_dim: int
    original_max_position_embeddings: int
    rope_type: RopeType = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def frequencies(rotary: Rotary, length: int) -> np.ndarray:
    """Radians a token of each plane, `[K/2]` float32, in a sequence of `length` tokens."""
    base, factor, trained = (
        rotary.rope_theta,
        rotary.factor,
        rotary.original_max_position_embeddings,
    )
    if rotary.rope_type == "dynamic":
        stretch = factor * max(length, trained) / trained - (factor - 1)
        base *= stretch ** (rotary.head_dim / (rotary.head_dim - 2))
    exponents = np.arange(0, rotary.head_dim, 2, dtype=np.float32) / np.float32(rotary.head_dim)
    plain = (1 / np.float32(base) ** exponents).astype(np.float32)
    if rotary.rope_type == "linear":
        return plain / np.float32(factor)
    if rotary.rope_type == "llama3":
        low, high = rotary.low_freq_factor, rotary.high_freq_factor
        turns = trained * plain / (2 * math.pi)
        return _between(plain, factor, np.clip((turns - low) / (high - low), 0, 1))
    if rotary.rope_type == "yarn":
        return _between(plain, factor, 1 - _yarn_ramp(rotary))
    return plain


def _between(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    return (plain / factor * (1 - kept) + plain * kept).astype(np.float32)


def _yarn_ramp(rotary: Rotary) -> np.ndarray:
    """The share of stretching of each plane."""

    def plane(turns: float) -> float:
        wavelength = rotary.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary.head_dim * math.log(wavelength) / (2 * math.log(rotary.rope_theta))

    low, high = plane(rotary.beta_fast), plane(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.head_dim - 1)
    width = high - low or 0.001
    return np.clip((np.arange(rotary.head_dim // 2, dtype=np.float32) - low) / width, 0, 1)


def rotate(rotary: Rotary, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Turns each head by its token's position.

    Args:
        rotary: the embedding.
        x: `[B, T, N K]`, N heads side by side.
        positions: `[B, T]`; None for 0..T-1.
    """
    batch, tokens, _ = x.shape
    if positions is None:
        positions = jnp.arange(tokens)[None]
    planes = frequencies(rotary, tokens)
    angles = positions.astype(jnp.float32)[:, :, None, None] * planes[None, None, None]
    cosine, sine = (
        (part * rotary.attention_factor).astype(x.dtype)
        for part in (jnp.cos(angles), jnp.sin(angles))
    )
    first, second = jnp.split(x.reshape(batch, tokens, -1, rotary.head_dim), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.reshape(x.shape)
