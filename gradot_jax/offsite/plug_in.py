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
    expected, got = _shapes(original), _shapes(adapter)
    differing = [
        f"{name}: got {got.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | got.keys())
        if got.get(name) != expected.get(name)
    ]
    if differing:
        raise InputError("the adapter does not fit this model: " + "; ".join(differing[:8]))
    cast = jax.tree.map(lambda new, old: new.astype(old.dtype), adapter, original)
    return Params(params.shell, (concatenate_blocks((cast.bottom, middle, cast.top)),))


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(adapter)[0]
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
