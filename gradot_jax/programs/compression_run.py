"""A compression as its programs see it: shapes, and where they lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gradot_jax.calibration.passes import Cotangents, embed_batch, layer_function
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.family import ModelConfig, attention_windows
from gradot_jax.models.params import get_block, model_shapes
from gradot_jax.models.split import AdapterSpec
from gradot_jax.programs.program import Place, Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A compression, as far as its programs depend on it.

    Attributes:
        config: of the model.
        split: blocks of the adapter.
        options: how to compress.
        place: where it runs.
        stored: dtype of the checkpoint.
        dtype: of the arithmetic.
        batch_size: rows of a calibration batch.
        num_batches: of the calibration.
        length: tokens of a row.
        held_out: batches on which gradients are compared.
        offload: whether boundaries are kept on the host.
    """

    config: ModelConfig
    split: AdapterSpec
    options: CompressionOptions
    place: Place
    stored: DTypeLike
    dtype: DTypeLike
    batch_size: int
    num_batches: int
    length: int
    held_out: int = 2
    offload: bool = False

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.config.num_hidden_layers

    @property
    def num_middle(self) -> int:
        """Layers of the middle."""
        return self.num_layers - self.split.num_blocks

    @property
    def shapes(self) -> Any:
        """The model as stored."""
        return model_shapes(self.config, self.stored)

    @property
    def shell(self) -> Any:
        """Embeddings, final norm and head, placed."""
        return self.place.params(self.shapes.shell)

    @property
    def block(self) -> Any:
        """One block, as stored, not placed."""
        return jax.eval_shape(lambda blocks: get_block(blocks, 0), self.shapes.segments[0])

    @property
    def batch(self) -> Any:
        """A batch, placed."""
        return self.place.batch(self.batch_size, self.length)

    def stream(self, batches: int) -> Any:
        """Residual streams of so many batches, `[S, B, T, D]`."""
        shape = (batches, self.batch_size, self.length, self.config.hidden_size)
        return self.place.array(shape, self.dtype, None, "data")

    def mask(self, batches: int) -> Any:
        """Which tokens are real, `[S, B, T]`."""
        shape = (batches, self.batch_size, self.length)
        return self.place.array(shape, jnp.int32, None, "data")

    def apply(self, skip_positions: int = 0) -> Any:
        """The function of a layer, with the widest window that there is."""
        windows = attention_windows(self.config, self.num_layers)
        widest = None if None in windows else max(w for w in windows if w is not None)
        return layer_function(self.config, widest, skip_positions)

    def boundaries(self, count: int) -> tuple:
        """So many streams at boundaries of layers, where they are kept on the devices."""
        return () if self.offload else (self.stream(self.num_batches),) * count

    @property
    def cotangents(self) -> Cotangents:
        """Those of all calibration batches, at one depth."""
        stream = self.stream(self.num_batches)
        true_too = self.options.fisher == "mc" and self.options.reads_gradient
        return Cotangents(stream, stream if true_too else None)


def embedding(run: Run, times: int, beside: tuple) -> Program:
    """The program that begins every pass over text."""
    args = (run.config, run.shell, run.batch, jnp.dtype(run.dtype))
    return Program(name="embedding", function=embed_batch, args=args, times=times, beside=beside)
