"""Teacher-forced scores of each sequence of a batch: what the accuracies are made of."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.run import head_operands, last_hidden
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.loss import target_scores


class SequenceScores(NamedTuple):
    """Scores of B sequences over their counted targets.

    Attributes:
        log_likelihood: `[B]`, nats, summed over the counted targets.
        exact: `[B]`, true where every counted target is the most likely token.
        num_targets: `[B]`, counted targets.
    """

    log_likelihood: jax.Array
    exact: jax.Array
    num_targets: jax.Array


@partial(jax.jit, static_argnames="config")
def sequence_scores(config: ModelConfig, params: Params, batch: Batch) -> SequenceScores:
    """Scores each row of a batch `[B, T]`, every token given the true ones before it."""
    hidden = last_hidden(config, params, batch.input_ids, batch.attention_mask)
    counted = batch.loss_mask > 0
    operands = head_operands(config, params.shell, hidden)
    scores = target_scores(*operands, batch.targets, counted)
    return SequenceScores(
        scores.log_likelihood.sum(-1), scores.exact.all(-1), counted.sum(-1, dtype=jnp.int32)
    )
