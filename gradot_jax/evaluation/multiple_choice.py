"""Multiple choice and exact match by the log-likelihood of each candidate answer."""

import dataclasses

import jax
import numpy as np

from gradot_jax.data.examples import choice_examples, eval_batches
from gradot_jax.data.records import ChoiceRecords, ItemRecords
from gradot_jax.evaluation.exact_match import ExactMatch
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
    records: ChoiceRecords | ItemRecords,
    *,
    batch_size: int,
    max_length: int | None = None,
    bos: bool = True,
) -> MultipleChoice:
    r"""Scores each continuation of each item; of equally likely ones the first is taken.

    The continuations of `ChoiceRecords` are ` {choice}` after `Question: {question}\nAnswer:`.
    Where an item accepts several, any of them is right and the likeliest counts.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        tokenizer: see `load_tokenizer`.
        records: questions with choices.
        batch_size: candidate answers a batch.
        max_length: tokens a row; the model's longest sequence when None.
        bos: whether every prompt begins with `bos_token_id`.

    Raises:
        InputError: when a choice does not fit the length.
    """
    scores, num_truncated = _scores(config, params, tokenizer, records, batch_size, max_length, bos)
    plain, normalised, gold = 0, 0, 0.0
    for item, (likelihood, _) in zip(records.items, scores, strict=True):
        plain += int(likelihood.argmax()) in item.accepted
        # The space in front separates an answer from its prompt; it is none of its characters.
        lengths = [len(text.removeprefix(" ")) or 1 for text in item.continuations]
        normalised += int((likelihood / lengths).argmax()) in item.accepted
        gold += float(likelihood[list(item.accepted)].max())
    count = len(records.records)
    return MultipleChoice(plain / count, normalised / count, gold / count, count, num_truncated)


def accepted_match(
    config: OPTConfig,
    params: Params,
    tokenizer,
    records: ItemRecords,
    *,
    batch_size: int,
    max_length: int | None = None,
    bos: bool = True,
) -> ExactMatch:
    """Share of items of which any accepted continuation is what greedy decoding gives.

    Teacher-forced, as in `exact_match`. The log-likelihood is that of the likeliest accepted
    continuation of each item.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        tokenizer: see `load_tokenizer`.
        records: prompts with the answers that are accepted.
        batch_size: continuations a batch.
        max_length: tokens a row; the model's longest sequence when None.
        bos: whether every prompt begins with `bos_token_id`.

    Raises:
        InputError: when a continuation does not fit the length.
    """
    scores, _ = _scores(config, params, tokenizer, records, batch_size, max_length, bos)
    matches, gold = 0, 0.0
    for item, (likelihood, exact) in zip(records.items, scores, strict=True):
        accepted = list(item.accepted)
        matches += bool(exact[accepted].any())
        gold += float(likelihood[accepted].max())
    count = len(records.records)
    return ExactMatch(matches / count, gold / count, count)


def _scores(
    config, params, tokenizer, records, batch_size, max_length, bos
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Log-likelihoods and exactness of each item's continuations, and how many were cut."""
    length = max_length or config.max_position_embeddings
    bos_id = config.bos_token_id if bos else None
    examples, num_truncated = choice_examples(tokenizer, records, bos_id, length)
    scores = [
        jax.device_get(sequence_scores(config, params, batch))
        for batch in eval_batches(examples, batch_size)
    ]
    likelihood = np.concatenate([batch.log_likelihood for batch in scores]).astype(np.float64)
    exact = np.concatenate([batch.exact for batch in scores])
    ends = np.cumsum([len(item.continuations) for item in records.items])
    rows = zip(np.split(likelihood, ends)[:-1], np.split(exact, ends)[:-1], strict=True)
    return list(rows), num_truncated
