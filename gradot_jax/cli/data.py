"""What a command names: the model or bundle to run, and examples from data."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from gradot_jax.cli.common import say
from gradot_jax.data.examples import prompt_examples, text_examples
from gradot_jax.data.records import ChoiceRecords, PromptRecords, TextRecords, read_records
from gradot_jax.data.tokenizer import check_vocabulary, document_start, load_tokenizer
from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.nn.batch import Batch


def open_tokenizer(folder: Path, config: ModelConfig):
    """The tokenizer of a checkpoint or a bundle; says what a document begins with.

    Raises:
        InputError: when there is none, or it has more tokens than the model.
    """
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    start = document_start(tokenizer, config)
    token = "none" if start is None else f"{tokenizer.convert_ids_to_tokens(start)!r:.80} ({start})"
    say(f"first token of every document and prompt: {token}", to=sys.stderr)
    return tokenizer


class LoadedModel(NamedTuple):
    """A model or an emulator as a command was asked to run it.

    Attributes:
        config: of the model.
        params: its weights, on their devices.
        tokenizer: of the model.
        end_ids: each of them ends a generated text.
    """

    config: ModelConfig
    params: Params
    tokenizer: Any
    end_ids: tuple[int, ...]


def example_length(config: ModelConfig, asked: int | None) -> int:
    """Tokens an example at most: what was asked for, or what the model takes, up to 2,048.

    Raises:
        InputError: when the model takes no sequence of that length.
    """
    longest = config.max_position_embeddings
    if asked is not None and not 1 <= asked <= longest:
        raise InputError(f"sequence_length must lie in [1, {longest}], got {asked}")
    return asked or min(longest, 2048)


def examples_of(
    tokenizer, config: ModelConfig, records: TextRecords | PromptRecords, length: int
) -> Batch:
    """Windows of text, or padded prompts with completions.

    Raises:
        InputError: when text is shorter than one window, or a completion does not fit.
    """
    start = document_start(tokenizer, config)
    if isinstance(records, PromptRecords):
        return prompt_examples(tokenizer, records, start, length)[0]
    try:
        return text_examples(tokenizer, records.records, length, start)
    except InputError as error:
        raise InputError(f"{records.source}: {error}") from None


def training_examples(tokenizer, config: ModelConfig, source: str, asked: int | None) -> Batch:
    """Examples to train or validate on.

    Raises:
        InputError: for multiple choice, or data that cannot be read.
    """
    records = read_records(source)
    if isinstance(records, ChoiceRecords):
        raise InputError(f"{records.source}: multiple choice is to evaluate on, not to train on")
    return examples_of(tokenizer, config, records, example_length(config, asked))
