"""The optimiser of the adapter: AdamW, a schedule, clipping and accumulation, all optax's own."""

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from gradot_jax.errors import InputError

Schedule = Literal["linear", "cosine", "constant"]

DECAYED = ("kernel", "left", "right")
"""Names of the leaves that decay: matrices of linear maps, and no bias or norm. Stacked leaves
all have a layer axis, so their number of axes does not tell the two apart."""


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    schedule: Schedule = "linear",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float | None = 1.0,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """AdamW whose weight decay reaches matrices only.

    Two optimisers of equal settings are different objects; hand the same one to runs that are to
    share a compiled training step.

    Args:
        learning_rate: the peak, reached after the warm-up.
        num_steps: updates until the schedule ends; with `accumulate` a run takes
            `num_steps * accumulate` batches.
        warmup_steps: updates over which the rate rises linearly from 0.
        schedule: how the rate falls from the peak to 0, or `constant`.
        weight_decay: decoupled; multiplied by the learning rate.
        betas: decay of the first and second moments.
        clip_norm: largest global norm of a gradient; None does not clip.
        accumulate: batches whose gradients are averaged into one update, each batch with the same
            weight however many targets it counts.

    Raises:
        InputError: when a setting is out of range.
    """
    _check(learning_rate, num_steps, warmup_steps, schedule, accumulate)
    if not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"the decays of the moments must lie in [0, 1), got {betas}")
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate)(
        learning_rate=_schedule(schedule, learning_rate, num_steps, warmup_steps)
    )
    optimizer = optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=betas[0], b2=betas[1]),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        rate,
    )
    if accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, accumulate).gradient_transformation()


shared_optimizer = functools.cache(make_optimizer)
"""The same object for equal settings, so that equal runs share a compiled step."""


class RatedOptimizer(optax.GradientTransformation):
    """An optimiser whose rate is part of its state.

    Only `update` enters a compiled step, so those that share it are equal whatever their rate.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RatedOptimizer) and self.update is other.update

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.update)


def rated_optimizer(factor: float, **settings: Any) -> RatedOptimizer:
    """`make_optimizer`, its whole schedule times a factor; equal settings share compiled steps.

    Args:
        factor: on the rate.
        settings: arguments of `make_optimizer`.

    Raises:
        InputError: when a setting is out of range.
    """
    if not 0 < factor < math.inf:
        raise InputError(f"the factor on a rate must be positive and finite, got {factor}")
    base = _with_step_size(**settings)

    def init(params: optax.Params) -> optax.OptState:
        return optax.tree.set(base.init(params), step_size=jnp.asarray(factor, jnp.float32))

    return RatedOptimizer(init, base.update)


@functools.cache
def _with_step_size(**settings: Any) -> optax.GradientTransformation:
    scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
    return optax.chain(make_optimizer(**settings), scale)


def decay_mask(params):
    """A tree of booleans, true at the leaves that weight decay reaches."""

    def decays(path, leaf) -> bool:
        del leaf
        return jax.tree_util.keystr(path[-1:], simple=True) in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def current_learning_rate(state: optax.OptState) -> jax.Array | None:
    """The learning rate of the latest update, or None when the state does not record one."""

    def recorded(name: str) -> jax.Array | None:
        return optax.tree.get(
            state, name, None, filtering=lambda _, value: isinstance(value, jax.Array)
        )

    rate, factor = recorded("learning_rate"), recorded("step_size")
    return rate if rate is None or factor is None else rate * factor


def _schedule(kind: Schedule, peak: float, num_steps: int, warmup_steps: int) -> optax.Schedule:
    remaining = num_steps - warmup_steps
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining),
        "constant": lambda: optax.constant_schedule(peak),
    }[kind]()
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def _check(
    learning_rate: float, num_steps: int, warmup_steps: int, schedule: str, accumulate: int
) -> None:
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate must be positive and finite, got {learning_rate}")
    if not 0 <= warmup_steps < num_steps:
        raise InputError(
            f"warmup_steps must lie in [0, num_steps), got warmup_steps = {warmup_steps} and "
            f"num_steps = {num_steps}"
        )
    if schedule not in get_args(Schedule):
        raise InputError(f"schedule {schedule!r} is not one of {', '.join(get_args(Schedule))}")
    if accumulate < 1:
        raise InputError(f"accumulate must be at least 1, got {accumulate}")
