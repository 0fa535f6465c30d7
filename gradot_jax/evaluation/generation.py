"""Completions of prompts, written a few tokens at a time until something ends each of them."""

from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.models.decode import GREEDY, Sampling, decode, longest_cached, prefill
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.parallel import DeviceMesh, put, to_host
from gradot_jax.progress import track

_STEPS = 16
"""Tokens between two looks at what was written, which a program on the host takes."""

_CONTEXT = 4
"""Tokens of the prompt with which a completion is decoded: some tokenizers' first loses a space."""

_SHORTEST = 32
DIVERGED = "the model's logits are not numbers, it has diverged or overflows this data type"


class Completion:
    """A completion being written.

    Attributes:
        ids: the tokens so far, the prompt's first.
        text: of the completion, without what ended it.
        done: whether it has ended.
        left: tokens that it may still have.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end_ids: Collection[int],
        detokenize: Callable[[list[int]], str],
        until: tuple[str, ...] = (),
    ) -> None:
        self.ids, self.text, self.done, self.left = list(prompt), "", max_tokens < 1, max_tokens
        self._detokenize, self._shown_from = detokenize, max(len(self.ids) - _CONTEXT, 0)
        self._prompt_length = len(self.ids)
        self._before = self.shown
        self._until, self._end_ids = tuple(filter(None, until)), frozenset(end_ids)

    @property
    def shown(self) -> str:
        """The end of the prompt, and the completion."""
        return self._detokenize(self.ids[self._shown_from :])

    def append(self, token: int) -> None:
        """Adds a token, and finds whether a stop string, an end token or the number ends it."""
        self.left -= 1
        self.done = token in self._end_ids or self.left < 1
        if token in self._end_ids:
            return
        self.ids.append(token)
        text = self.shown
        if text.startswith(self._before):
            text = text[len(self._before) :]
        else:
            text = self._detokenize(self.ids[self._prompt_length :])
        ends = [text.index(stop) for stop in self._until if stop in text]
        self.text, self.done = text[: min(ends, default=len(text))], self.done or bool(ends)


def complete(
    config: ModelConfig,
    params: Params,
    jobs: Sequence[Completion],
    *,
    batch_size: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    mesh: DeviceMesh | None = None,
    progress: bool = False,
) -> None:
    """Writes completions to their ends.

    What is drawn for a completion depends on the seed and on its place among the jobs, not on the
    batch that it is in.

    Args:
        config: the model's configuration.
        params: its weights, an assembled emulator's, or a plugged-in model's; placed on the mesh.
        jobs: the completions, each of at least one token so far.
        batch_size: completions that are written side by side.
        sampling: how tokens are chosen.
        seed: of what is drawn.
        mesh: devices to lay batches on; `batch_size` is a multiple of those along it.
        progress: whether to report.

    Raises:
        InputError: when a prompt is empty, has tokens outside the vocabulary or does not fit the
            model with its completion, a number is out of its range, or logits are not numbers.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in [0, 2^32), got {seed}")
    if not all(job.ids for job in jobs):
        raise InputError("a prompt without tokens: it is empty, and nothing begins a text")
    if any(not 0 <= token < config.vocab_size for job in jobs for token in job.ids):
        raise InputError(f"a prompt has tokens outside the vocabulary of {config.vocab_size}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not (sampling.temperature == 0 or 1e-3 <= sampling.temperature < 1e3):
        raise InputError(f"temperature must be 0 or in [0.001, 1000), got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"top_p must lie in (0, 1], got {sampling.top_p}")
    longest = max((len(job.ids) + job.left for job in jobs), default=0)
    most = longest_cached(config)
    if longest > most:
        raise InputError(
            f"prompt and completion have up to {longest} tokens, expected at most the {most} that "
            "the model can decode"
        )
    keys = jax.random.split(jax.random.key(seed), max(len(jobs), 1))
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(jobs)), key=lambda index: -len(jobs[index].ids))
    starts = range(0, len(order), batch_size)
    for start in track(starts, "generation", enabled=progress):
        places = np.asarray(order[start : start + batch_size])
        own = keys[np.resize(places, batch_size)]
        _write(config, params, [jobs[place] for place in places], batch_size, sampling, own, mesh)


def _write(
    config: ModelConfig,
    params: Params,
    jobs: Sequence[Completion],
    batch_size: int,
    sampling: Sampling,
    keys: jax.Array,
    mesh: DeviceMesh | None,
) -> None:
    longest = max(len(job.ids) for job in jobs)
    length = min(padded_length(longest), longest_cached(config))
    capacity = padded_length(max(length, longest + max(job.left for job in jobs)))
    ids, counts = np.zeros((batch_size, length), np.int32), np.ones(batch_size, np.int32)
    for row, job in enumerate(jobs):
        ids[row, : len(job.ids)], counts[row] = job.ids, len(job.ids)
    if mesh is not None:
        ids, counts = put((ids, counts), mesh.batched)
    decoding = prefill(config, params, ids, counts, capacity=capacity)
    while not all(job.done for job in jobs):
        decoding, tokens = decode(config, params, decoding, keys, sampling=sampling, steps=_STEPS)
        # Rows go on after their end until all have come to theirs; nobody reads that.
        for job, row in zip(jobs, to_host(tokens), strict=False):
            for token in map(int, row):
                if job.done:
                    break
                if token < 0:
                    raise InputError(f"no token is likeliest after {job.shown[-60:]!r}: {DIVERGED}")
                job.append(token)


def padded_length(length: int) -> int:
    """The least of a few lengths, powers of two, that takes `length` tokens."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())
