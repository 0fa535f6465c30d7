"""Examples from the data that a command names."""

from gradot_jax.data.examples import prompt_examples, text_examples
from gradot_jax.data.records import ChoiceRecords, PromptRecords, TextRecords, read_records
from gradot_jax.errors import InputError
from gradot_jax.models.family import ModelConfig
from gradot_jax.nn.batch import Batch


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
    if isinstance(records, PromptRecords):
        return prompt_examples(tokenizer, records, config.bos_token_id, length)[0]
    try:
        return text_examples(tokenizer, records.records, length, config.bos_token_id)
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
