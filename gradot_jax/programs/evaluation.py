"""The programs that run a whole model: losses, scores of answers, and decoding."""

from typing import Literal

import jax
import jax.numpy as jnp

from gradot_jax.evaluation.perplexity import jitted_loss
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.decode import Decoding, decode, prefill
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.run import forward
from gradot_jax.programs.program import Place, Program


def evaluation_programs(
    config: ModelConfig,
    params: Params,
    place: Place,
    *,
    batch_size: int,
    length: int,
    kind: Literal["text", "answers"],
    batches: int = 1,
) -> list[Program]:
    """Those of perplexity on text, or of exact match and of choices among answers.

    Args:
        config: of the model.
        params: its shapes, or an assembled emulator's, in the dtype of the arithmetic.
        place: where they lie.
        batch_size: rows of a batch.
        length: tokens of a row.
        kind: what is measured.
        batches: of the data.
    """
    function = jitted_loss if kind == "text" else sequence_scores
    args = (config, place.params(params), place.batch(batch_size, length))
    name = "loss of a batch" if kind == "text" else "scores of a batch"
    return [Program(name=name, function=function, args=args, times=batches)]


def decoding_programs(
    config: ModelConfig, params: Params, place: Place, *, batch_size: int, length: int, steps: int
) -> list[Program]:
    """Those of `models.decode`: prompts of one length, and tokens after them."""
    params = place.params(params)
    ids = place.array((batch_size, length), jnp.int32, "data")
    counts = place.array((batch_size,), jnp.int32, "data")
    capacity = length + steps
    started = jax.eval_shape(
        lambda *arrays: prefill(config, *arrays, capacity=capacity), params, ids, counts
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))

    def over_rows(leaf: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        return place.array(leaf.shape, leaf.dtype, *[None] * axis, "data")

    decoding = Decoding(
        jax.tree.map(lambda leaf: over_rows(leaf, 1), started.caches),
        over_rows(started.logits, 0),
        over_rows(started.counts, 0),
    )
    return [
        Program(
            name="prompts",
            function=prefill,
            args=(config, params, ids, counts),
            kwargs={"capacity": capacity},
        ),
        Program(
            name="new tokens",
            function=decode,
            args=(config, params, decoding, over_rows(keys, 0)),
            kwargs={"steps": steps},
        ),
        Program(name="logits", function=forward, args=(config, params, ids, ids)),
    ]
