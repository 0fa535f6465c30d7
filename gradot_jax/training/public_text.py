"""The owner's public text where a method trains on it: what is held out, and the order of the rest.

Batches come as a sequence, so whole batches are held out and shuffled, and no rows of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gradot_jax.errors import InputError
from gradot_jax.nn.batch import Batch

FEWEST = 4
"""Batches from which on some are held out."""


def hold_out(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Batches to train on, and those held out: the last eighth, at least one; none of very few.

    Raises:
        InputError: without a batch, or when what is held out, or the whole where nothing is,
            counts no target.
    """
    if not batches:
        raise InputError("training on public text needs at least one batch, there is none")
    count = max(len(batches) // 8, 1) if len(batches) >= FEWEST else 0
    rest, held_out = batches[: len(batches) - count], batches[len(batches) - count :]
    if not any(np.any(batch.loss_mask) for batch in held_out or rest):
        raise InputError(
            f"the last {count or len(batches)} of {len(batches)} batches of public text count no "
            "target: each loss_mask is zero"
        )
    return rest, held_out


def shuffled_epochs(batches: Sequence[Batch], seed: int) -> Callable[[int], Iterator[Batch]]:
    """Epochs without end over at least one batch, each in an order of its own, drawn by a seed.

    Returns:
        A function from the number of batches already taken to those that follow.
    """

    def following(start: int) -> Iterator[Batch]:
        first, offset = divmod(start, len(batches))
        for epoch in itertools.count(first):
            key = np.array([seed, epoch]).astype(np.uint64)
            # The raw bits, because NumPy promises those to be the same in every version.
            order = np.argsort(np.random.Philox(key=key).random_raw(len(batches)), kind="stable")
            yield from (batches[index] for index in order[offset:].tolist())
            offset = 0

    return following
