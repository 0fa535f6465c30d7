"""Exact match of completions under teacher forcing."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import to_host


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Result of `exact_match`.

    Attributes:
        exact_match: share of examples, 0 to 1; NaN where a log-likelihood is.
        log_likelihood: of the completion, nats, mean over examples.
        num_examples: examples with at least one counted token.
    """

    exact_match: float
    log_likelihood: float
    num_examples: int


def exact_match(config: ModelConfig, params: Params, batches: Iterable[Batch]) -> ExactMatch:
    """Share of examples whose every counted token is the model's most likely one.

    Teacher-forced, which for an exact match is what greedy decoding would give: the first token
    that differs decides both. Rows in which no token counts are padding and are left out.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        batches: of equal shape, see `eval_batches`; they compile once.

    Raises:
        InputError: when no example counts.
    """
    matches, total, count = 0, 0.0, 0
    for batch in batches:
        scores = to_host(sequence_scores(config, params, batch))
        real = scores.num_targets > 0
        matches += int((scores.exact & real).sum())
        total += float(np.sum(scores.log_likelihood[real], dtype=np.float64))
        count += int(real.sum())
    if not count:
        raise InputError("exact match: no token counts in any batch")
    return matched(matches, total, count)


def matched(matches: int, log_likelihood: float, count: int) -> ExactMatch:
    """Sums over `count` examples as their means; a model that has diverged matches NaN of them."""
    share = math.nan if math.isnan(log_likelihood) else matches / count
    return ExactMatch(share, log_likelihood / count, count)
