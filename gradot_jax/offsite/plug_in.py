"""Plug-in: tuned adapter blocks around the original middle."""

import jax
import jax.numpy as jnp

from gradot_jax.errors import InputError
from gradot_jax.models.params import Params, merge_segments
from gradot_jax.models.split import Adapter, split_model


def plug_in(params: Params, adapter: Adapter) -> Params:
    """The original model with its adapter blocks replaced; nothing else changes.

    Args:
        params: the full original model.
        adapter: tuned blocks; which layers they replace is read from its split.

    Returns:
        A model like `params`; the adapter takes the dtype of what it replaces.

    Raises:
        InputError: when the adapter's arrays do not fit the blocks that they replace, or are not
            finite in their dtype.
    """
    original = split_model(params, adapter.split)
    expected, got = _shapes(original.adapter), _shapes(adapter)
    differing = [
        f"{name}: got {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | got.keys())
        if got.get(name) != expected.get(name)
    ]
    if differing:
        raise InputError("the adapter does not fit this model: " + "; ".join(differing[:8]))
    cast = jax.tree.map(lambda new, old: new.astype(old.dtype), adapter, original.adapter)
    _check_finite(cast)
    return Params(params.shell, merge_segments(original.assemble(cast).segments))


def _check_finite(adapter: Adapter) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(adapter)[0]:
        if not jnp.isfinite(leaf).all():
            raise InputError(
                f"the adapter does not fit this model: {jax.tree_util.keystr(path)} is not finite "
                f"in {leaf.dtype}"
            )


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(adapter)[0]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
