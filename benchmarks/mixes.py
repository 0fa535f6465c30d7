"""Components or channels: the paper's mix of the two, and the other three, at one budget.

    python -m benchmarks.mixes --model smollm2 --data real_data \
        --calibration real_data/calibration/documents.jsonl --out mixes

GradOT reduces the rank of attention's maps and the channels of MLPs. A mix names one of both for
each, with the same scores: components of an MLP's kernels can go as well, and attention has
channels too. One of values is a feature of a key-value head, with the rows of the output map that
read it in every query head of the group; one of queries and keys is a rotary pair of features, or a
single feature where nothing is rotated. Attention's channels are set to zero where they are, since
heads keep their width; shares count kernels as if they were cut, and none exceeds the budget.

OUT holds a file for each part that is finished, as `gradot compare` has them, and `result.json`.
Nothing of this ships: it says which mix to build.
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.calibration.sweep import run_forward, sweep_middle
from gradot_jax.cli.data import open_tokenizer, training_examples
from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.jobs import Job, choose_rate, finetuned
from gradot_jax.comparison.question_sets import question_tasks, question_testbed
from gradot_jax.comparison.stages import RATES, Case
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.compression.budget import channel_pool, rank_pool, uniform_counts
from gradot_jax.compression.channel import cut_channels
from gradot_jax.compression.rank import cut_rank, keep_order
from gradot_jax.compression.score import channel_terms, component_terms, moved_columns
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.linalg.svd import svd
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import get_block
from gradot_jax.models.split import adapter_of
from gradot_jax.nn.layout import Block, maps
from gradot_jax.nn.linear import Dense, Linear
from gradot_jax.offsite.emulator import Emulator, build_emulator

MIXES = {
    "paper": ("components", "channels"),
    "components-everywhere": ("components", "components"),
    "channels-everywhere": ("channels", "channels"),
    "reverse": ("channels", "components"),
}
"""What goes of attention, and what of MLPs."""

Group = dict[str, list[int]]
"""Features that go together: columns of q, k and v and rows of the output map, by site."""


def attention_groups(config: ModelConfig, block: Block) -> dict[str, list[Group]]:
    """Channels of attention: of `queries` with keys, and of `values` with the output map.

    Raises:
        InputError: for a block whose queries or keys have norms, which all features share.
    """
    if any(getattr(block, name, None) is not None for name in ("q_norm", "k_norm")):
        raise InputError("channels of queries and keys that are normed are not independent")
    q, k, v, out = block.layout.low_rank
    width = maps(block)[k].shape[1] // _key_heads(config)
    groups = maps(block)[q].shape[1] // maps(block)[k].shape[1]
    alone = [(j,) for j in range(width)]
    pairs = [(j, j + width // 2) for j in range(width // 2)]

    def features(head: int, own: tuple[int, ...]) -> list[int]:
        return [head * width + j for j in own]

    def of_queries(head: int, own: tuple[int, ...]) -> list[int]:
        return [j for r in range(groups) for j in features(head * groups + r, own)]

    heads = range(_key_heads(config))
    return {
        "queries": [
            {q: of_queries(head, own), k: features(head, own)}
            for head in heads
            for own in (pairs if hasattr(config, "rotary") else alone)
        ],
        "values": [
            {v: features(head, (j,)), out: of_queries(head, (j,))}
            for head in heads
            for j in range(width)
        ],
    }


def _key_heads(config: ModelConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def feature_scores(
    layer: Mapping[str, Dense], factors: Mapping[str, KroneckerFactors], out: str
) -> dict[str, np.ndarray]:
    """`||A Delta G||_1` for each column of q, k and v, and each row of the output map, alone.

    A column goes with its bias.
    """

    def of_site(site: str) -> jax.Array:
        a, g = factors[site].input_covariance, factors[site].gradient_covariance
        if site != out:
            return jnp.abs(moved_columns(layer[site], factors[site])).sum(0) * jnp.abs(g).sum(0)
        with jax.default_matmul_precision("highest"):
            kernel = layer[site].kernel.astype(jnp.float32)
            return jnp.abs(a).sum(0) * jnp.abs(kernel @ g).sum(1)

    return {site: np.asarray(of_site(site)) for site in layer}


def without(weights: Dense, features: list[int], *, rows: bool) -> Dense:
    """A map with rows, or columns and their biases, set to zero."""
    kernel, bias = np.array(weights.kernel), weights.bias
    if rows:
        kernel[features] = 0
        return Dense(jnp.asarray(kernel), bias)
    kernel[:, features] = 0
    return Dense(
        jnp.asarray(kernel), None if bias is None else bias.at[jnp.asarray(features)].set(0)
    )


def fewer_components(
    layer: Mapping[str, Dense], factors: Mapping[str, KroneckerFactors], budget: float
) -> dict[str, Linear]:
    """Some maps with as many components as the budget pays for, the best by DRD's score."""
    pools = [rank_pool(*weights.shape) for weights in layer.values()]
    ranks, done = uniform_counts(pools, budget), {}
    for (site, weights), rank, pool in zip(layer.items(), ranks, pools, strict=True):
        parts = jax.tree.map(lambda leaf: leaf[0], svd(weights.kernel[None]))
        order = keep_order(component_terms(parts, factors[site]).hessian, pool.floor)
        done[site], _ = cut_rank(weights, parts, np.asarray(order), rank)
    return done


def fewer_features(
    config: ModelConfig,
    block: Block,
    factors: Mapping[str, KroneckerFactors],
    budget: float,
) -> dict[str, Linear]:
    """Attention's maps without the channels of least score; as many of each kind as the budget."""
    *_, out = block.layout.low_rank
    layer = {site: maps(block)[site] for site in block.layout.low_rank}
    scores = feature_scores(layer, factors, out)
    for groups in attention_groups(config, block).values():
        (count,) = uniform_counts([channel_pool(len(groups), 1)], budget)
        own = [sum(scores[site][where].sum() for site, where in g.items()) for g in groups]
        for index in np.argsort(-np.array(own), kind="stable")[count:]:
            for site, where in groups[index].items():
                layer[site] = without(layer[site], where, rows=site == out)
    return layer


def mixed_block(
    config: ModelConfig,
    block: Block,
    factors: Mapping[str, KroneckerFactors],
    mix: str,
    budget: float,
) -> Block:
    """One block of the middle, reduced."""
    layout, layer = block.layout, maps(block)
    attention = {site: layer[site] for site in layout.low_rank}
    mlp = {site: layer[site] for site in (*layout.channels.into, layout.channels.out)}
    of_attention, of_mlp = MIXES[mix]
    if of_attention == "components":
        attention = fewer_components(attention, factors, budget)
    else:
        attention = fewer_features(config, block, factors, budget)
    if of_mlp == "components":
        mlp = fewer_components(mlp, factors, budget)
    else:
        (count,) = uniform_counts([channel_pool(mlp[layout.channels.out].shape[0], 1)], budget)
        order = keep_order(channel_terms(layout.channels, layer, factors).hessian, 0)
        mlp, _ = cut_channels(layout.channels, layer, np.asarray(order), count)
    return block.replace(**attention, **mlp)


def mixed_emulators(bed: Testbed, mixes: list[str], budget: float) -> dict[str, Emulator]:
    """The emulators of several mixes, by one calibration."""
    model = bed.config, bed.params, bed.split
    forward = run_forward(*model, list(bed.calibration(0)))
    blocks: dict[str, list[Block]] = {mix: [] for mix in mixes}
    for index, factors in sweep_middle(*model, forward):
        block = get_block(bed.params.segments[0], index + bed.split.num_bottom)
        for mix, done in blocks.items():
            done.insert(0, mixed_block(bed.config, block, factors, mix, budget))
    adapter = adapter_of(bed.params, bed.split)
    return {mix: build_emulator(bed.params.shell, adapter, own) for mix, own in blocks.items()}


def study(bed: Testbed, mixes: list[str], budget: float, out: Path) -> dict[str, Any]:
    """Fidelity of each mix, and what its tuned emulator and its plug-in are worth on each task."""
    store = CellStore(out / "cells")
    made = functools.cache(lambda: mixed_emulators(bed, mixes, budget))
    rows: dict[str, Any] = {}
    for mix in mixes:
        case = Case(f"mix-{mix}", budget, 0)
        origin = {
            "mix": mix,
            "budget": budget,
            "model": bed.model_digest,
            "split": dataclasses.asdict(bed.split),
            "calibration": bed.calibration_digest(0),
        }

        def fidelity(mix=mix) -> dict[str, Any]:
            emulator = made()[mix]
            found = gradient_fidelity(bed.config, bed.params, emulator, bed.held_out)
            of_adapter = found.adapter
            return {
                "loss_gap": found.loss_gap,
                "gradient_relative_error": of_adapter.relative_error,
                "gradient_cosine": of_adapter.cosine,
            }

        settings = {"cell": "fidelity", "origin": origin, "held_out": bed.held_out_digest}
        rows[mix] = dict(store.get("fidelity", case._asdict(), settings, fidelity)["result"])
        for task in bed.tasks:
            job = Job(bed, store, out / "curves", case, task, origin, lambda mix=mix: made()[mix])
            search = choose_rate(job, 0, RATES)
            cell = finetuned(job, 0, search.rate, search.best)
            measured = {
                name: cell["result"][name][task.metric]
                for name in ("emulator_finetuned", "plug_in")
            }
            rows[mix][task.name] = {"rate": cell["rate"], **measured}
            print(mix, task.name, rows[mix][task.name], flush=True)
    return rows


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per task")
    parser.add_argument("--calibration", required=True, help="the model owner's text")
    parser.add_argument("--tasks", nargs="+", default=["city"])
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        config, params = load_model(Path(given.model), dtype="float32")
        tokenizer = open_tokenizer(Path(given.model), config)
        text = training_examples(tokenizer, config, given.calibration, given.sequence_length)
        bed = question_testbed(
            given.model,
            config,
            params,
            question_tasks(given.tasks, config, tokenizer, preset="corrected", data=given.data),
            text,
            num_sequences=given.num_sequences,
            batch_size=8,
        )
        rows = study(bed, given.mixes, given.budget, given.out)
    except InputError as error:
        parser.error(str(error))
    record = {"model": Path(given.model).name, "budget": given.budget, "mixes": rows}
    write_result(given.out / "result.json", {**record, "environment": environment()})


if __name__ == "__main__":
    main()
