"""From records to token examples, and from examples to batches.

A data set of examples is one `Batch` of numpy arrays whose leading axis counts examples. Every
document and prompt begins with the token `bos_id`, if any (`data.tokenizer.document_start`).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gradot_jax.data.records import ChoiceRecords, ItemRecords, Prompt, PromptRecords
from gradot_jax.data.tokenizer import encode, encode_after
from gradot_jax.errors import InputError
from gradot_jax.nn.batch import Batch

_MULTIPLE = 8


def token_stream(tokenizer, texts: Iterable[str], bos_id: int | None) -> np.ndarray:
    """Token ids `[N]` of texts end to end, each begun by `bos_id`; empty texts are left out."""
    return _stream(tokenizer, (text for text in texts if text), bos_id)


def _stream(tokenizer, texts: Iterable[str], bos_id: int | None) -> np.ndarray:
    start = [] if bos_id is None else [bos_id]
    documents = [[*start, *encode(tokenizer, text)] for text in texts]
    return np.concatenate([np.asarray(ids, np.int32) for ids in [[], *documents]])


def windows(stream: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """The windows of `length + 1` tokens of a stream `[N]` at `starts` `[B]`; all targets count."""
    rows = stream[starts[:, None] + np.arange(length + 1)]
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return Batch(inputs, targets, np.ones(inputs.shape, np.float32), np.ones_like(inputs))


def text_examples(tokenizer, texts: Iterable[str], length: int, bos_id: int | None) -> Batch:
    """Texts end to end, cut into consecutive windows that share no token.

    Each window has `length + 1` tokens: `length` inputs and as many targets. So the first token
    of a window is never predicted, and the tokens after the last whole window are dropped.

    Args:
        tokenizer: see `load_tokenizer`.
        texts: documents.
        length: T of the examples.
        bos_id: begins every document; None for none.

    Returns:
        Examples `[number of windows, length]`.

    Raises:
        InputError: when the texts are shorter than one window.
    """
    return _consecutive([token_stream(tokenizer, texts, bos_id)], length)


def line_examples(
    tokenizer, lines: Sequence[str], length: int, bos_id: int | None, *, num_groups: int
) -> Batch:
    """Windows as offsite-tuning's code cuts a text that comes in lines.

    Every line begins with `bos_id`, empty ones too. The lines are dealt into `num_groups` runs
    that differ by one line at most, the longer ones first; no window reaches from one run into
    the next, so the end of each is dropped. Otherwise as `text_examples`.

    Args:
        tokenizer: see `load_tokenizer`.
        lines: in the order of the text.
        length: T of the examples.
        bos_id: begins every line; None for none.
        num_groups: processes that the text was prepared by.

    Raises:
        InputError: when no run makes a window.
    """
    groups = np.array_split(np.arange(len(lines)), num_groups)
    streams = [_stream(tokenizer, (lines[int(row)] for row in group), bos_id) for group in groups]
    return _consecutive(streams, length)


def _consecutive(streams: Sequence[np.ndarray], length: int) -> Batch:
    counts = [len(stream) // (length + 1) for stream in streams]
    if not sum(counts):
        raise InputError(
            f"the text is shorter than one sequence: it has {max(map(len, streams))} tokens, a "
            f"sequence of length {length} needs {length + 1}"
        )
    kept = [stream[: n * (length + 1)] for stream, n in zip(streams, counts, strict=True)]
    return windows(np.concatenate(kept), np.arange(sum(counts)) * (length + 1), length)


def prompt_examples(
    tokenizer,
    records: PromptRecords,
    bos_id: int | None,
    max_length: int,
    *,
    eos_id: int | None = None,
) -> tuple[Batch, int]:
    """Prompts followed by their completions, with loss on the completion's tokens only.

    Prompt and completion are tokenised apart (`encode_after`), and a completion ends as it is
    given unless `eos_id` is. Rows are padded on the right to the longest, rounded up to a multiple
    of 8. A prompt that is too long loses its beginning; `bos_id` stays in front of the rest.

    Args:
        tokenizer: see `load_tokenizer`.
        records: prompts and completions.
        bos_id: begins every prompt; None for none.
        max_length: largest T.
        eos_id: token to end every completion with; None for none.

    Returns:
        Examples `[number of records, T]`, and how many prompts were cut.

    Raises:
        InputError: when a completion does not fit `max_length`, or has no tokens.
    """
    end = [] if eos_id is None else [eos_id]
    labels = [f"{records.source} record {i + 1}" for i in range(len(records.records))]
    return _completion_examples(tokenizer, records.records, labels, bos_id, max_length, end)


def choice_examples(
    tokenizer, records: ChoiceRecords | ItemRecords, bos_id: int | None, max_length: int
) -> tuple[Batch, int]:
    r"""One row per candidate answer, item by item, with loss on the answer's tokens only.

    `ChoiceRecords` are rendered as the prompt `Question: {question}\nAnswer:` and the completion
    ` {choice}`, `ItemRecords` are taken as they are; otherwise as `prompt_examples`.

    Args:
        tokenizer: see `load_tokenizer`.
        records: questions.
        bos_id: begins every prompt; None for none, as published results were measured.
        max_length: largest T.

    Returns:
        Examples `[sum of the numbers of choices, T]`, and how many prompts were cut.

    Raises:
        InputError: when a choice does not fit `max_length`, or nothing precedes one.
    """
    pairs, labels = [], []
    for number, item in enumerate(records.items, start=1):
        pairs += [Prompt(item.prompt, continuation) for continuation in item.continuations]
        labels += [f"{records.source} record {number}"] * len(item.continuations)
    return _completion_examples(tokenizer, pairs, labels, bos_id, max_length, [])


def _completion_examples(
    tokenizer,
    pairs: Sequence[Prompt],
    labels: Sequence[str],
    bos_id: int | None,
    max_length: int,
    end: list[int],
) -> tuple[Batch, int]:
    start = [] if bos_id is None else [bos_id]
    rows, cuts = [], 0
    for pair, label in zip(pairs, labels, strict=True):
        prompt = encode(tokenizer, pair.prompt)
        completion = encode_after(tokenizer, pair.prompt, pair.completion) + end
        if not 1 <= len(completion) <= max_length:
            raise InputError(
                f"{label}: its completion has {len(completion)} tokens, expected 1 to the "
                f"sequence length {max_length}"
            )
        if not start and not prompt:
            raise InputError(f"{label}: no token precedes its completion: the prompt is empty")
        # A row of T inputs and T targets holds T + 1 tokens, the first of them never predicted.
        room = max_length + 1 - len(start) - len(completion)
        cuts += len(prompt) > room
        rows.append((start + prompt[max(len(prompt) - room, 0) :], completion))
    longest = max(len(prompt) + len(completion) - 1 for prompt, completion in rows)
    length = min(-(-longest // _MULTIPLE) * _MULTIPLE, max_length)
    return padded_examples(rows, length), cuts


def padded_examples(rows: Sequence[tuple[list[int], list[int]]], length: int) -> Batch:
    """Token ids of prompts and completions as rows `[N, length]`, padded on the right.

    A row holds at most `length + 1` tokens, at least one of them in its prompt; the loss is on its
    completion.
    """
    shape = (len(rows), length)
    # Token 0 under a zero attention mask: no model reads it.
    inputs, targets, attention = (np.zeros(shape, np.int32) for _ in range(3))
    loss = np.zeros(shape, np.float32)
    for row, (prompt, completion) in enumerate(rows):
        ids = prompt + completion
        used = len(ids) - 1
        inputs[row, :used], targets[row, :used] = ids[:-1], ids[1:]
        attention[row, :used] = 1
        loss[row, len(prompt) - 1 : used] = 1.0
    return Batch(inputs, targets, loss, attention)


def take(examples: Batch, rows: np.ndarray | slice) -> Batch:
    """Some rows of examples."""
    return Batch(*(field[rows] for field in examples))


def epoch_batches(
    examples: Batch, batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """Endless shuffled batches; batch number n is a function of the examples, seed and n alone.

    Each epoch visits the examples in a new order and drops the rest that fills no batch, so a
    run resumes exactly from its step count.

    Args:
        examples: `[N, T]`.
        batch_size: rows of each batch.
        seed: of the orders, at least 0.
        start_step: number of batches to skip, at no cost.

    Raises:
        InputError: when there are fewer examples than `batch_size`.
    """
    count = len(examples.input_ids)
    _check_batch_size(batch_size)
    if count < batch_size:
        raise InputError(f"a batch of {batch_size} needs as many examples, there are {count}")
    return _epochs(examples, batch_size, seed, start_step)


def _epochs(examples: Batch, batch_size: int, seed: int, step: int) -> Iterator[Batch]:
    per_epoch = len(examples.input_ids) // batch_size
    while True:
        epoch, first = divmod(step, per_epoch)
        order = _permutation(len(examples.input_ids), seed, epoch)
        for index in range(first, per_epoch):
            yield take(examples, order[index * batch_size : (index + 1) * batch_size])
        step = (epoch + 1) * per_epoch


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises the same raw bits in every version, and not the same Generator.permutation.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(bits, kind="stable")


def eval_batches(examples: Batch, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order, in batches of equal shape, so that they compile once.

    The last batch is filled up with copies of the first example whose loss mask is zero.

    Args:
        examples: `[N, T]`.
        batch_size: rows of each batch.

    Raises:
        InputError: when there are no examples.
    """
    _check_batch_size(batch_size)
    if not len(examples.input_ids):
        raise InputError("there are no examples to evaluate on")
    return _in_order(examples, batch_size)


def _in_order(examples: Batch, batch_size: int) -> Iterator[Batch]:
    count = len(examples.input_ids)
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        real = rows < count
        batch = take(examples, np.where(real, rows, 0))
        yield batch._replace(loss_mask=batch.loss_mask * real[:, None].astype(np.float32))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
