"""Plug-in: tuned adapter blocks around the original middle."""

import jax

from gradot_jax.errors import InputError
from gradot_jax.models.opt.params import Params, concatenate_blocks
from gradot_jax.offsite.split import Adapter, split_blocks


def plug_in(params: Params, adapter: Adapter) -> Params:
    """The original model with its outer blocks replaced; nothing else changes.

    Args:
        params: the full original model.
        adapter: tuned blocks; the split is read from its depth.

    Returns:
        A model like `params`; the adapter takes the dtype of what it replaces.

    Raises:
        InputError: when the adapter's arrays do not fit the blocks that they replace.
    """
    original, middle = split_blocks(params, adapter.spec)
    expected = jax.tree_util.tree_flatten_with_path(original)[0]
    got = jax.tree_util.tree_flatten_with_path(adapter)[0]
    differing = [
        f"{jax.tree_util.keystr(path)}: got {leaf.shape}"
        for path, leaf in got
        if (path, leaf.shape) not in {(p, e.shape) for p, e in expected}
    ]
    if differing or len(expected) != len(got):
        raise InputError("the adapter does not fit this model: " + "; ".join(differing[:8]))
    cast = jax.tree.map(lambda new, old: new.astype(old.dtype), adapter, original)
    return Params(params.shell, (concatenate_blocks((cast.bottom, middle, cast.top)),))
