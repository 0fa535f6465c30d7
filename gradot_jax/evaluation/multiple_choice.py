"""Multiple choice and exact match by the log-likelihood of each candidate answer."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from gradot_jax.data.examples import choice_examples, eval_batches
from gradot_jax.data.records import ChoiceRecords, Item, ItemRecords
from gradot_jax.data.tokenizer import document_start
from gradot_jax.evaluation.exact_match import ExactMatch, matched
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import to_host


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions as tokens: made once, however many models are measured on them.

    Attributes:
        items: prompts with their continuations.
        examples: `[sum of the numbers of continuations, T]`, item by item.
        num_truncated: examples whose prompt lost its beginning to the length limit.
    """

    items: tuple[Item, ...]
    examples: Batch
    num_truncated: int


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """Result of `multiple_choice`.

    Both accuracies are NaN where any log-likelihood is: a diverged model prefers no answer.

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
    config: ModelConfig,
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
        bos: whether every prompt begins with the token of `document_start`.

    Raises:
        InputError: when a choice does not fit the length.
    """
    questions = tokenise(config, tokenizer, records, max_length=max_length, bos=bos)
    return choice_accuracy(config, params, questions, batch_size=batch_size)


def tokenise(
    config: ModelConfig,
    tokenizer,
    records: ChoiceRecords | ItemRecords,
    *,
    max_length: int | None = None,
    bos: bool = True,
) -> Questions:
    """Questions for `choice_accuracy` and `accepted_match`; see `multiple_choice`."""
    length = max_length or config.max_position_embeddings
    bos_id = document_start(tokenizer, config) if bos else None
    return Questions(records.items, *choice_examples(tokenizer, records, bos_id, length))


def choice_accuracy(
    config: ModelConfig, params: Params, questions: Questions, *, batch_size: int
) -> MultipleChoice:
    """`multiple_choice` on questions that are tokenised."""
    plain, normalised, gold, unknown = 0, 0, 0.0, False
    for item, likelihood, _ in _scores(config, params, questions, batch_size):
        # The largest of numbers one of which is NaN would be the first NaN.
        unknown |= bool(np.isnan(likelihood).any())
        plain += int(likelihood.argmax()) in item.accepted
        # The space in front separates an answer from its prompt; it is none of its characters.
        lengths = [len(text.removeprefix(" ")) or 1 for text in item.continuations]
        normalised += int((likelihood / lengths).argmax()) in item.accepted
        gold += float(likelihood[list(item.accepted)].max())
    count = len(questions.items)
    plain, normalised = (math.nan, math.nan) if unknown else (plain / count, normalised / count)
    return MultipleChoice(plain, normalised, gold / count, count, questions.num_truncated)


def accepted_match(
    config: ModelConfig, params: Params, questions: Questions, *, batch_size: int
) -> ExactMatch:
    """Share of items of which any accepted continuation is what greedy decoding gives.

    Teacher-forced, as in `exact_match`. The log-likelihood is that of the likeliest accepted
    continuation of each item. Arguments as in `choice_accuracy`.
    """
    matches, gold = 0, 0.0
    for item, likelihood, exact in _scores(config, params, questions, batch_size):
        accepted = list(item.accepted)
        matches += bool(exact[accepted].any())
        gold += float(likelihood[accepted].max())
    return matched(matches, gold, len(questions.items))


def _scores(
    config: ModelConfig, params: Params, questions: Questions, batch_size: int
) -> Iterator[tuple[Item, np.ndarray, np.ndarray]]:
    """Each item with the log-likelihoods and the exactness of its continuations."""
    scores = [
        to_host(sequence_scores(config, params, batch))
        for batch in eval_batches(questions.examples, batch_size)
    ]
    likelihood = np.concatenate([batch.log_likelihood for batch in scores]).astype(np.float64)
    exact = np.concatenate([batch.exact for batch in scores])
    # The rest fills the last batch.
    ends = np.cumsum([len(item.continuations) for item in questions.items])
    likelihoods, exactness = (np.split(values, ends)[:-1] for values in (likelihood, exact))
    return zip(questions.items, likelihoods, exactness, strict=True)
