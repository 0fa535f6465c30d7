"""The memory that a compression takes, from shapes alone.

A compression that streams (`Method.streams`) has on the devices the shell, the residual streams
at the boundaries of layers, and one layer: its weights, its factors, its scores. The original
stays in its file and finished layers in host memory. Its peak is the largest of four moments: the
head, the sweep of a layer and its scoring, at each of which all boundaries of the calibration are
alive, and the sweep of two models by which their gradients are compared.

The other methods have the whole model on the devices, as it was loaded and as it was split, and
train some layers of it.

Formulas count arrays. What compilers and allocators add to them is in `PROGRAMS` and `ARENAS`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from gradot_jax.compression.channel_set import BLOCK
from gradot_jax.curvature.tap import zero_taps
from gradot_jax.memory.forecast import forecast
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.family import ModelConfig, channel_count
from gradot_jax.models.params import count_params, model_shapes
from gradot_jax.models.partition import partition_specs
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.attention import MAX_SCORES
from gradot_jax.nn.layout import maps
from gradot_jax.nn.loss import MAX_LOGITS

PROGRAMS = 256 * 2**20
SCORING_PROGRAMS = 192 * 2**20
"""Bytes of host memory for compiled programs and the compiler's own work: of every method, and
what those that decompose and score add. As measured on a CPU, rounded up."""

ARENAS = 768 * 2**20
"""Bytes that the C library may keep of arrays that a CPU has freed, in an arena for each thread.

Up to twice the arrays that are alive were seen; of large ones, from 32 MiB on, it keeps none.
"""

_PASSING = 5
"""Streams that a step of a sweep has on the devices whatever is offloaded: the layer's input and
output, and cotangents as they come, stacked, and of the true loss."""

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a compression takes beyond what Python and JAX take at rest.

    The first five are of the host, the others of each device.

    Attributes:
        checkpoint: the mapped file. Its pages count as memory of the process while they are in
            use, but the system drops them before it runs out.
        finished: layers of the emulator that are done, and what a global allocation keeps of each.
        adapter: blocks of the adapter as they are shipped.
        programs: compiled programs.
        offloaded: residual streams that are kept on the host.
        shell: embeddings, final norm and head.
        boundaries: residual streams at the boundaries of layers.
        layer: weights of one layer, as stored and in the dtype of the arithmetic.
        sums: Kronecker factors of one layer while they are summed, and its gradient.
        factors: the same as matrices, while the layer is scored.
        activations: of one layer in one batch, for its gradient.
        logits: of one batch.
        decomposition: singular vectors of the attention maps, and work space.
        comparison: boundaries of two models on the held-out text.
        gradient: of a layer, as it is summed for the comparison.
        model: of methods that do not stream, all weights, twice.
        training: of these, what is trained with its optimiser, and activations of all layers.
    """

    checkpoint: int
    finished: int
    adapter: int
    programs: int
    offloaded: int
    shell: int
    boundaries: int
    layer: int
    sums: int
    factors: int
    activations: int
    logits: int
    decomposition: int
    comparison: int
    gradient: int
    model: int
    training: int

    @property
    def device(self) -> int:
        """Peak of each device."""
        sweep = self.layer + self.sums + self.activations
        scoring = self.layer + self.factors + self.decomposition
        calibration = self.boundaries + max(self.logits, sweep, scoring)
        back = self.gradient + self.layer + self.activations
        comparison = self.shell + self.comparison + max(self.logits, back)
        training = self.training and self.training + self.logits
        return self.model + self.shell + max(calibration, comparison, training)

    @property
    def host(self) -> int:
        """Peak of the host beside mapped files."""
        return self.finished + self.adapter + self.programs + self.offloaded

    def shared_host(self, num_devices: int) -> int:
        """Peak of a host beside mapped files whose memory that many devices share, as CPUs do."""
        arrays = num_devices * self.device
        return self.host + arrays + min(2 * arrays, ARENAS)

    def parts(self, place: Literal["host", "device"]) -> dict[str, int]:
        """The named parts of one place."""
        values = dataclasses.asdict(self)
        names = list(values)
        end = names.index("shell")
        return {name: values[name] for name in (names[:end] if place == "host" else names[end:])}


def estimate_memory(
    config: ModelConfig,
    storage_dtype: DTypeLike,
    split: AdapterSpec,
    *,
    batch_size: int,
    num_batches: int,
    length: int,
    options: CompressionOptions,
    compute_dtype: DTypeLike,
    held_out: int = 2,
    offload: bool = False,
    data: int = 1,
    model: int = 1,
) -> MemoryEstimate:
    """Estimates a compression.

    Args:
        config: of the model.
        storage_dtype: of the checkpoint, and of the bundle.
        split: which blocks are the adapter.
        batch_size: B, sequences a batch over all devices.
        num_batches: S.
        length: T, tokens a sequence.
        options: how to compress.
        compute_dtype: of the arithmetic.
        held_out: batches on which gradients are compared.
        offload: whether boundaries are kept on the host.
        data: devices along the batch.
        model: devices along the weights.

    Raises:
        InputError: for a split without a middle, or a budget that cannot be met.
    """
    stored, computed = (jnp.dtype(dtype).itemsize for dtype in (storage_dtype, compute_dtype))
    outlook, method, shapes = forecast(config, split, options), options.record, model_shapes(config)
    rows = math.ceil(batch_size / data)
    tokens = rows * length
    stream = num_batches * tokens * config.hidden_size * computed
    num_streams = _streams(config, split, options)
    on_device = min(num_streams, _PASSING) if offload else num_streams
    shell = _sharded(shapes.shell, data, model) * stored
    adapter = outlook.unchanged - count_params(shapes.shell)
    return MemoryEstimate(
        checkpoint=outlook.original * stored,
        finished=outlook.kept * stored + _kept_for_scores(config, split, options),
        adapter=adapter * stored,
        programs=PROGRAMS + (SCORING_PROGRAMS if method.scores else 0),
        shell=shell,
        offloaded=(num_streams - on_device) * data * stream,
        boundaries=on_device * stream,
        layer=_layer(config, stored, computed, data, model),
        sums=_sums(config, options, computed, model),
        factors=_factors(config, options),
        activations=_activations(config, rows, length, computed, model),
        logits=_logits(config, tokens, computed, model),
        decomposition=_decomposition(config, options),
        comparison=_comparison(config, held_out * tokens, computed),
        gradient=_gradient(config, computed, model),
        model=0 if method.streams else 2 * computed * _sharded(shapes, data, model),
        training=0
        if method.streams
        else _training(config, outlook.trained, tokens, computed, model),
    )


def _kept_for_scores(config, split, options: CompressionOptions) -> int:
    """With a global allocation, the singular vectors of every layer, and its factors."""
    if options.allocation != "global":
        return 0
    layers = config.num_hidden_layers - split.num_blocks
    vectors = sum(min(shape) * sum(shape) for shape in _low_rank(config))
    return layers * (vectors * _FLOAT32 + _factors(config, options))


def _low_rank(config: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of the kernels whose rank is reduced."""
    block = config.family.block_shapes(config)
    return [maps(block)[site].shape for site in block.layout.low_rank]


def _streams(config, split, options: CompressionOptions) -> int:
    """Streams `[S, B, T, D]` alive at the head.

    The input of each layer above the bottom, the last output, and cotangents, as they come and
    stacked; those of the true loss likewise.
    """
    if options.calibrates != "factors":
        return 3
    cotangents = 4 if options.fisher == "mc" and options.reads_gradient else 2
    return config.num_hidden_layers - split.num_bottom + 1 + cotangents


def _layer(config, stored: int, computed: int, data: int, model: int) -> int:
    """A block as placed, and gathered over `data` in the dtype of the arithmetic."""
    block = config.family.block_shapes(config)
    return _sharded(block, data, model) * stored + _sharded(block, 1, model) * computed


def _sums(config, options: CompressionOptions, computed: int, model: int) -> int:
    """Zeros to start from, the sum with its compensation, and the term that is added."""
    if options.calibrates == "nothing":
        return 0
    taps = jax.eval_shape(
        lambda: zero_taps(
            config.family.block_shapes(config),
            with_outputs=options.calibrates == "factors",
            with_removals=options.channel_score == "token-fisher",
        )
    )
    gradient = _gradient(config, computed, model) if options.reads_gradient else 0
    entries = sum(leaf.size for leaf in jax.tree.leaves(taps) if leaf.ndim == 2)
    return 4 * entries * _FLOAT32 + gradient


def _factors(config, options: CompressionOptions) -> int:
    """A and G of every site, those of the low-rank sites also stacked."""
    if options.calibrates == "nothing":
        return 0
    block, both = config.family.block_shapes(config), options.calibrates == "factors"

    def size(shape: tuple[int, int]) -> int:
        return shape[0] ** 2 + (shape[1] ** 2 if both else 0)

    sites = [weights.shape for weights in maps(block).values()]
    return sum(map(size, [*sites, *_low_rank(config)])) * _FLOAT32


def _activations(config, rows: int, length: int, computed: int, model: int) -> int:
    """Residuals and cotangents of a block, as its maps split along `model`.

    16 of width D and 5 of width F for each map into the channels; scores of attention, their
    exponentials and the cotangent in float32, for a quarter of the queries at a time and no more
    than `MAX_SCORES`.
    """
    wide = math.ceil(_ffn_width(config) / model)
    heads = math.ceil(config.num_attention_heads / model)
    queries = min(max(math.ceil(length / 4), 128), length)
    scores = min(rows * heads * queries * length, MAX_SCORES) * 3 * _FLOAT32
    return rows * length * (16 * config.hidden_size + 5 * wide) * computed + scores


def _ffn_width(config: ModelConfig) -> int:
    """Width of all that the maps into the channels yield."""
    return channel_count(config) * len(config.family.layout.channels.into)


def _logits(config, tokens: int, computed: int, model: int) -> int:
    """Logits and what is made of them, four in float32 of `MAX_LOGITS`; the head in arithmetic."""
    vocabulary, embed = config.family.shell_shapes(config).embed_tokens.shape
    vocabulary = math.ceil(vocabulary / model)
    return 4 * min(tokens * vocabulary, MAX_LOGITS) * _FLOAT32 + vocabulary * embed * computed


def _decomposition(config, options: CompressionOptions) -> int:
    """Singular vectors and products for the scores.

    Of each low-rank map with its vectors 3 D^2, its share of the work space and products 4.5 more;
    products of the MLP's 5 D F; sets of channels by their Fisher 3 F^2, by their score 4 D F of
    each map of the MLP and 6 blocks of candidates.
    """
    if not options.record.scores:
        return 0
    ffn = channel_count(config)
    sets = 0
    if options.channel_score == "token-fisher":
        sets = 3 * ffn**2
    elif options.channel_score == "gcs-set":
        sets = 4 * config.hidden_size * (_ffn_width(config) + ffn) + 6 * min(BLOCK, ffn**2)
    attention = sum(7.5 * max(shape) ** 2 for shape in _low_rank(config))
    products = 5 * config.hidden_size * _ffn_width(config)
    return int(attention + products + sets) * _FLOAT32


def _comparison(config, tokens: int, computed: int) -> int:
    """Streams of both models: inputs of all layers, the last output, cotangents twice."""
    return 2 * (config.num_hidden_layers + 3) * tokens * config.hidden_size * computed


def _gradient(config, computed: int, model: int) -> int:
    """A layer's gradient summed in float32 with compensation, and the term that is added."""
    block = config.family.block_shapes(config)
    return _sharded(block, 1, model) * (3 * _FLOAT32 + computed)


def _training(config, trained: int, tokens: int, computed: int, model: int) -> int:
    """Weights, two moments and the gradient in float32; what each layer keeps for its own."""
    wide = math.ceil(_ffn_width(config) / model)
    kept = config.num_hidden_layers * tokens * (8 * config.hidden_size + 2 * wide) * computed
    return 4 * _FLOAT32 * trained + kept


def _sharded(tree, data: int, model: int) -> int:
    """Parameters of a tree that the fullest device holds."""
    specs = partition_specs(tree, data=data, model=model)
    sizes = {"data": data, "model": model}

    def part(spec: PartitionSpec, leaf) -> int:
        axes = [name for axis in spec for name in (axis if isinstance(axis, tuple) else (axis,))]
        return leaf.size // math.prod(sizes.get(name, 1) for name in axes)

    return sum(jax.tree.leaves(jax.tree.map(part, specs, tree)))
