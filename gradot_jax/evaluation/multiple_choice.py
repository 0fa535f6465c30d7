"""Multiple-choice accuracy by the log-likelihood of each candidate answer."""

import dataclasses

import jax
import numpy as np

from gradot_jax.data.examples import choice_examples, eval_batches
from gradot_jax.data.records import ChoiceRecords
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.params import Params


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Result of `multiple_choice`.

    Attributes:
        accuracy: share of items whose right answer is the likeliest, 0 to 1.
        accuracy_normalised: the same with each log-likelihood divided by the answer's characters.
        log_likelihood: of the right answer, nats, mean over items.
        num_items: questions.
        num_truncated: candidate answers whose question lost its beginning to the length limit.
    """

    accuracy: float
    accuracy_normalised: float
    log_likelihood: float
    num_items: int
    num_truncated: int


def multiple_choice(
    config: OPTConfig,
    params: Params,
    tokenizer,
    records: ChoiceRecords,
    *,
    batch_size: int,
    max_length: int | None = None,
) -> MultipleChoice:
    r"""Scores ` {choice}` after `Question: {question}\nAnswer:` for each choice of each item.

    Of equally likely choices the first is taken.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        tokenizer: see `load_tokenizer`.
        records: questions with choices.
        batch_size: candidate answers a batch.
        max_length: tokens a row; the model's longest sequence when None.

    Raises:
        InputError: when a choice does not fit the length.
    """
    length = max_length or config.max_position_embeddings
    examples, num_truncated = choice_examples(tokenizer, records, config.bos_token_id, length)
    scores = [
        jax.device_get(sequence_scores(config, params, batch).log_likelihood)
        for batch in eval_batches(examples, batch_size)
    ]
    rows = np.concatenate(scores).astype(np.float64)
    plain, normalised, gold, start = 0, 0, 0.0, 0
    for item in records.records:
        likelihood = rows[start : start + len(item.choices)]
        start += len(item.choices)
        plain += int(likelihood.argmax() == item.answer)
        per_character = likelihood / [len(choice) for choice in item.choices]
        normalised += int(per_character.argmax() == item.answer)
        gold += float(likelihood[item.answer])
    count = len(records.records)
    return MultipleChoice(plain / count, normalised / count, gold / count, count, num_truncated)
