"""Perplexity of a model on token windows."""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.run import summed_loss
from gradot_jax.nn.batch import Batch

jitted_loss = jax.jit(summed_loss, static_argnames="config")


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`.

    Attributes:
        nats_per_token: mean loss over the counted tokens.
        num_tokens: counted tokens.
        perplexity: `exp(nats_per_token)`, per token of the model's tokenizer.
    """

    nats_per_token: float
    num_tokens: int
    perplexity: float


def perplexity(config: ModelConfig, params: Params, batches: Iterable[Batch]) -> Perplexity:
    """Mean loss over every counted token of the batches, each token with equal weight.

    Windows of `text_examples` share no token: each is read by itself, its first token is not
    predicted, and its early tokens see little context. Perplexities are comparable only at equal
    window length and tokenizer.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        batches: of equal shape, see `eval_batches`; they compile once.

    Raises:
        InputError: when no token counts.
    """
    total, count = 0.0, 0
    for batch in batches:
        loss, tokens = jitted_loss(config, params, batch)
        total += float(loss)
        count += int(tokens)
    if not count:
        raise InputError("perplexity: no token counts in any batch")
    mean = total / count
    with np.errstate(over="ignore"):
        return Perplexity(mean, count, float(np.exp(mean)))
