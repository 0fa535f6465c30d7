"""What it costs to compile and to run layers of different ranks and channels.

    python -m benchmarks.ragged --out ragged.json

The middle of an emulator, forward and back to its input as a fine-tuning step goes, with its
layers arranged in each of these ways:

- `unrolled`: one after the other, without a scan;
- `segments`: a scan for each run of equal layers;
- `bucket-m`: ranks and channels rounded up to multiples of m, then `segments`;
- `waste-w`: the fewest stacks with at most a share w of zeros (`models.opt.ragged`);
- `largest`: one stack, filled up to the largest.

Sizes are those that global allocation chose for the twelve middle layers of the bundled model at
a budget, scaled in width and, for more layers, interpolated; or drawn evenly from 50 % below to
50 % above the middle of the range, which is harder than what was ever seen.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import MIN_RUNS, timed
from benchmarks.workloads import Suite, model
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.opt.forward import apply_layer, run_blocks
from gradot_jax.models.opt.params import (
    ATTENTION_SITES,
    Block,
    Segment,
    count_params,
    get_block,
    segment_blocks,
)
from gradot_jax.models.opt.ragged import merge_segments
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.nn.norm import LayerNorm

Sizes = np.ndarray
"""`[L, 5]`: ranks of q, k, v and out as shares of the rank at which two factors save nothing, and
channels as a share of F."""

CHOSEN: dict[str, list[tuple[int, ...]]] = {
    "global-0.6": [
        (9, 12, 21, 20, 237),
        (16, 16, 20, 23, 122),
        (23, 24, 31, 35, 116),
        (32, 32, 36, 43, 214),
        (24, 29, 38, 40, 228),
        (36, 37, 40, 43, 283),
        (46, 47, 48, 53, 322),
        (36, 40, 48, 51, 378),
        (50, 52, 51, 56, 423),
        (59, 60, 62, 63, 442),
        (46, 48, 51, 55, 456),
        (29, 29, 41, 41, 465),
    ],
    "global-0.3": [
        (7, 7, 9, 11, 34),
        (7, 7, 9, 11, 37),
        (7, 8, 17, 19, 26),
        (12, 14, 21, 25, 62),
        (7, 9, 21, 21, 58),
        (15, 17, 23, 26, 81),
        (25, 27, 28, 33, 149),
        (13, 17, 28, 29, 161),
        (23, 28, 28, 31, 244),
        (31, 34, 35, 40, 302),
        (18, 21, 25, 26, 336),
        (10, 11, 15, 15, 353),
    ],
}
"""Of `gradot+` in `results/compare`: of 64 components and 512 channels; a matrix that was kept
whole counts as 63, so that all are of one kind."""

SPREAD = "spread"
ARRANGEMENTS = (
    "unrolled",
    "segments",
    "bucket-32",
    "bucket-64",
    "bucket-128",
    "waste-0.1",
    "waste-0.25",
    "largest",
)
_SECONDS = 900.0


class Shape(NamedTuple):
    """Width, sequences and tokens of each, and the numbers of layers to measure."""

    width: int
    batch_size: int
    length: int
    depths: tuple[int, ...]


SHAPES: dict[Suite, Shape] = {
    "cpu": Shape(256, 4, 128, (12, 24)),
    "device": Shape(1024, 8, 512, (24,)),
}


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record of all arrangements at the shape of a suite."""
    # An accelerator's compiler is slow: what says most comes in the time that there is.
    chosen = ARRANGEMENTS if suite == "cpu" else ("segments", "waste-0.1", "waste-0.25", "largest")
    yield from grow(SHAPES[suite], chosen, _SECONDS)


def measure(
    shape: Shape, arrangements: Sequence[str], time_limit: float, path: Path | None = None
) -> dict[str, Any]:
    """The whole record; with a path it is written as it grows.

    Args:
        shape: see `Shape`.
        arrangements: of `ARRANGEMENTS`.
        time_limit: seconds; what is not begun by then is listed under `left_out`.
        path: of a JSON file.
    """
    record: dict[str, Any] = {}
    for record in grow(shape, arrangements, time_limit):
        if path is not None:
            write_result(path, record)
    return record


def grow(shape: Shape, arrangements: Sequence[str], time_limit: float) -> Iterator[dict[str, Any]]:
    """The record of `measure` after each case."""
    record: dict[str, Any] = {"environment": environment(), "shape": shape._asdict()}
    record |= {"points": [], "left_out": [], "complete": False}
    deadline = time.monotonic() + time_limit
    for depth in shape.depths:
        for name in (*CHOSEN, SPREAD):
            if time.monotonic() > deadline:
                record["left_out"].append({"sizes": name, "layers": depth})
                continue
            record["points"] += _points(shape, name, depth, arrangements)
            yield record
    yield record | {"complete": not record["left_out"]}


def _points(shape: Shape, name: str, depth: int, arrangements: Sequence[str]):
    """One case: everything is compiled, and then run in turn so that a disturbance hits all."""
    config = model(depth, shape.width, max(shape.width // 64, 1), vocabulary=128)
    blocks = layers(config, sizes(name, depth))
    weights = count_params(blocks)
    key = jax.random.key(0)
    hidden = jax.random.normal(key, (shape.batch_size, shape.length, shape.width))
    points, programs = [], []
    for arrangement in arrangements:
        middle = jax.tree.map(jnp.asarray, arrange(blocks, arrangement))
        step = jax.jit(
            step_unrolled if arrangement == "unrolled" else step_scanned, static_argnums=0
        )
        compiling, program = timed(step.lower(config, middle, hidden).compile)
        programs.append((program, middle))
        points.append(
            {
                "sizes": name,
                "layers": depth,
                "arrangement": arrangement,
                "stacks": len(middle),
                "zeros": count_params(middle) / weights - 1,
                "compile_seconds": compiling,
            }
        )
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(1 + MIN_RUNS):
        for seconds, (program, middle) in zip(times, programs, strict=True):
            seconds.append(timed(program, middle, hidden)[0])
    for found, (_, *seconds) in zip(points, times, strict=True):
        found |= {"median_seconds": statistics.median(seconds), "min_seconds": min(seconds)}
    return points


def step_scanned(
    config: OPTConfig, middle: tuple[Segment, ...], hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The output of the middle `[B, T, D]`, and the gradient that its input gets."""
    output, pull = jax.vjp(lambda h: run_blocks(config, middle, h), hidden)
    return output, pull(output)[0]


def step_unrolled(
    config: OPTConfig, middle: tuple[Segment, ...], hidden: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same without scans, of stacks of one layer each."""

    def run(h: jax.Array) -> jax.Array:
        for stack in middle:
            h = apply_layer(config, get_block(stack, 0), h)
        return h

    output, pull = jax.vjp(run, hidden)
    return output, pull(output)[0]


def sizes(name: str, depth: int) -> Sizes:
    """Sizes of the layers of a case, `[depth, 5]`."""
    if name == SPREAD:
        return np.random.default_rng(0).uniform(0.3, 0.9, (depth, 5))
    shares = np.array(CHOSEN[name]) / [64, 64, 64, 64, 512]
    places = np.linspace(0, len(shares) - 1, depth)
    return np.stack([np.interp(places, np.arange(len(shares)), c) for c in shares.T], axis=1)


def layers(config: OPTConfig, shares: Sizes) -> list[Block]:
    """Random layers of some sizes, on the host."""
    rng, width, ffn = np.random.default_rng(0), config.hidden_size, config.ffn_dim

    def random(*shape: int) -> np.ndarray:
        return 0.02 * rng.standard_normal(shape, np.float32)

    def low_rank(share: float) -> LowRank:
        rank = max(int(share * width / 2), 1)
        return LowRank(random(width, rank), random(rank, width), random(width))

    def layer(*ranks: float) -> Block:
        *ranks, channels = ranks
        count = int(channels * ffn)
        norm = LayerNorm(np.ones(width, np.float32), np.zeros(width, np.float32))
        return Block(
            self_attn_layer_norm=norm,
            final_layer_norm=norm,
            fc1=Dense(random(width, count), random(count)),
            fc2=Dense(random(count, width), random(width)),
            **{site: low_rank(r) for site, r in zip(ATTENTION_SITES, ranks, strict=True)},
        )

    return [layer(*row) for row in shares]


def arrange(blocks: Sequence[Block], arrangement: str) -> tuple[Segment, ...]:
    """The stacks of one of `ARRANGEMENTS`."""
    kind, _, value = arrangement.partition("-")
    if kind == "bucket":
        return segment_blocks([_rounded_up(block, int(value)) for block in blocks])
    singles = [jax.tree.map(lambda leaf: leaf[None], block) for block in blocks]
    if kind == "unrolled":
        return tuple(singles)
    waste = {"segments": 0.0, "largest": math.inf}.get(kind)
    return merge_segments(singles, waste=float(value) if waste is None else waste)


def _rounded_up(block: Block, multiple: int) -> Block:
    width = block.fc2.shape[1]

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, 0 if n == width else -n % multiple) for n in leaf.shape])

    return jax.tree.map(pad, block)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SHAPES, default="cpu")
    parser.add_argument("--arrangements", nargs="+", default=ARRANGEMENTS)
    parser.add_argument("--time-limit", type=float, default=_SECONDS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shape = SHAPES[options.suite]
    record = measure(shape, options.arrangements, options.time_limit, options.out)
    for row in record["points"]:
        print(*(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), sep="\t")


if __name__ == "__main__":
    main()
