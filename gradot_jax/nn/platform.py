"""What a program does one way on CPUs and another on GPUs, decided by where its arrays are."""

from collections.abc import Callable
from typing import Any

import jax


def platform_of(tree: Any) -> str | None:
    """`cpu`, `gpu` or `tpu`: that of the mesh which arrays are on, traced or not; None off any."""
    for leaf in jax.tree.leaves(tree):
        device = getattr(jax.typeof(leaf).sharding.mesh, "abstract_device", None)
        # JAX 0.10.0 does not say it.
        if platform := getattr(device, "platform", None):
            return platform
    return None


def by_platform(
    default: Callable[..., Any], operands: tuple[Any, ...], **choices: Callable[..., Any]
) -> Any:
    """What a function makes of operands that is made for the platform on which they are.

    On a mesh that is known as this is traced; elsewhere every function is traced, and the program
    that is compiled has the one for its platform alone.

    Args:
        default: for platforms that are not named.
        operands: trees of arrays, the arguments.
        **choices: functions for `cpu`, `cuda` or `tpu`; their results are of the same shapes.
    """
    if not choices:
        return default(*operands)
    platform = platform_of(operands)
    if platform is None:
        return jax.lax.platform_dependent(*operands, default=default, **choices)
    return choices.get("cuda" if platform == "gpu" else platform, default)(*operands)
