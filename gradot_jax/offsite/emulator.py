"""The emulator: what the model owner ships."""

import flax.struct

from gradot_jax.models.opt.params import Block, Params, Shell, depth
from gradot_jax.offsite.split import Adapter


@flax.struct.dataclass
class Emulator:
    """A compressed model as the data owner receives it.

    It is no `Params`, and nothing that ships accepts a `Params`: the original cannot be shipped
    by passing the wrong object.

    Attributes:
        shell: embeddings, final norm and head; frozen.
        adapter: the original's outer blocks, to be trained.
        middle: compressed blocks in depth order, as stacks of equal shape; frozen.
    """

    shell: Shell
    adapter: Adapter
    middle: tuple[Block, ...]

    def assemble(self, adapter: Adapter | None = None) -> Params:
        """The runnable model: this emulator's middle within an adapter (its own by default)."""
        adapter = self.adapter if adapter is None else adapter
        segments = (adapter.bottom, *self.middle, adapter.top)
        return Params(self.shell, tuple(s for s in segments if depth(s)))
