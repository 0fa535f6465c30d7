"""A block as data: which linear maps it has, what each of them reads, and which go together.

Everything that compresses, shards, stores or counts a block reads its layout, and names no site.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from gradot_jax.nn.linear import Linear


class Site(NamedTuple):
    """One linear map of a block.

    Attributes:
        name: of the block's field.
        reads: name of the tapped input; sites that read one share its covariance.
        path: Hugging Face's name within the layer.
        split: the axis of the kernel `[D_in, D_out]` that tensor parallelism splits.
        of_heads: whether that axis is one of heads, `Block.head_dim` wide, of which none is cut.
    """

    name: str
    reads: str
    path: str
    split: Literal["column", "row"]
    of_heads: bool = False


class Channels(NamedTuple):
    """Hidden features that are kept or removed together.

    Attributes:
        into: sites whose outputs they are.
        out: the site whose input they are.
    """

    into: tuple[str, ...]
    out: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a block is made of.

    Attributes:
        sites: its linear maps, in the order in which they are stored.
        channels: of its MLP.
        norms: field and Hugging Face name within the layer of each norm, likewise.
    """

    sites: tuple[Site, ...]
    channels: Channels
    norms: tuple[tuple[str, str], ...]

    @property
    def low_rank(self) -> tuple[str, ...]:
        """Sites outside the channels: those whose rank is reduced."""
        together = (*self.channels.into, self.channels.out)
        return tuple(site.name for site in self.sites if site.name not in together)


class Block(Protocol):
    """One decoder block of some family, or a stack of such (a leading layer axis on each leaf).

    A flax dataclass whose fields are the sites and norms of its layout; a norm may be None. Where
    sites are `of_heads` it has a static field `head_dim`.
    """

    layout: ClassVar[Layout]

    def replace(self, **fields: Any) -> Self:
        """The block with some of its fields replaced."""
        ...


class Projected(NamedTuple):
    """What the attention of a block reads, `[B, T, H K]` and twice `[B, T, G K]`.

    Queries are of H heads, keys and values of G, of which each serves H / G heads in a row.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array


def shaped(*sizes: int) -> jax.ShapeDtypeStruct:
    """A float32 array of these sizes as a shape without the array."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def maps(block: Block) -> "dict[str, Linear]":
    """The linear maps of a block by site."""
    return {site.name: getattr(block, site.name) for site in block.layout.sites}


def is_block(node: object) -> bool:
    """Whether a node of a tree is a block of whatever family."""
    return isinstance(getattr(type(node), "layout", None), Layout)
