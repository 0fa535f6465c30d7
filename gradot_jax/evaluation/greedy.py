"""Greedy completion of prompts, the whole sequence read anew for every token."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.run import forward


@partial(jax.jit, static_argnames="config")
def next_tokens(
    config: ModelConfig, params: Params, input_ids: jax.Array, counts: jax.Array
) -> jax.Array:
    """The likeliest next token of each sequence.

    Args:
        config: the model's configuration.
        params: its weights, or an assembled emulator's.
        input_ids: `[B, T]`, padded on the right.
        counts: `[B]`, tokens of each sequence, at least 1.

    Returns:
        `[B]` token ids; -1 where the model's logits are not numbers, so that none is likeliest.
    """
    mask = jnp.arange(input_ids.shape[1])[None] < counts[:, None]
    logits = forward(config, params, input_ids, mask.astype(jnp.int32))
    last = jnp.take_along_axis(logits, counts[:, None, None] - 1, axis=1)[:, 0]
    return jnp.where(jnp.isnan(last).any(-1), -1, last.argmax(-1))


class Completion:
    """A completion being written.

    Attributes:
        ids: the tokens so far, the prompt's first.
        text: of the completion, without what ended it.
        done: whether it has ended.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        until: tuple[str, ...],
        end_id: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.ids, self.text, self.done = list(prompt), "", False
        self._prompt_length, self._left = len(prompt), max_tokens
        self._until, self._end_id, self._decode = tuple(filter(None, until)), end_id, decode

    def append(self, token: int) -> None:
        """Adds a token, and finds whether a stop string, the end token or the number ends it."""
        self._left -= 1
        self.done = token == self._end_id or not self._left
        if token == self._end_id:
            return
        self.ids.append(token)
        text = self._decode(self.ids[self._prompt_length :])
        ends = [text.index(stop) for stop in self._until if stop in text]
        self.text, self.done = text[: min(ends, default=len(text))], self.done or bool(ends)
