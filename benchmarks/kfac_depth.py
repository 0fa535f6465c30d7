"""How good the Kronecker factors are by depth: `||A Delta G||_1` beside the exact Hessian's action.

    python -m benchmarks.kfac_depth --model bundled --num-sequences 4 --out toy.json
    python -m benchmarks.kfac_depth --model FOLDER --calibration TEXT.jsonl --layers 2 14 23 27 \
        --num-sequences 2 --candidates 8 --out smollm2-135m.json
    python -m benchmarks.kfac_depth --draw toy.json smollm2-135m.json --out depth.png

The Hessian is that of the same batch's mean loss with respect to one kernel alone, by `jax.jvp` of
`jax.grad`. Between the two stands the empirical Fisher that the factors approximate, with a datum a
token: `(1/N) sum_n (x_n^T Delta g_n) x_n g_n^T`. A Delta removes one singular component, or one
channel's column or row, or all that `gradot` does; biases stay. Candidates lie evenly along the
falling order of the score. A file that is there already is gone on with.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.hessian import hessian_norms, token_rows
from gradot_jax.calibration.sweep import run_forward, sweep_middle
from gradot_jax.cli.data import examples_of
from gradot_jax.compression.rank import cut_rank
from gradot_jax.curvature.factors import KroneckerFactors
from gradot_jax.data.examples import take
from gradot_jax.data.records import read_records
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.bundled_tasks import calibration_examples
from gradot_jax.demo.corpus import bundled_facts, bundled_model
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.methods.allocation import layer_orders, layer_pools, uniform_layer_counts
from gradot_jax.methods.gradot import gradot_rule
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.methods.scored import propose
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.params import Params, get_block
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import Block, maps
from gradot_jax.nn.linear import dense_kernel

OPTIONS, SPLIT = CompressionOptions(method="gradot", budget=0.6), AdapterSpec()
_PANELS = (("ratio", "median ratio to the Hessian"), ("rank_correlation", "rank correlation"))


@jax.jit
def fisher_norms(factors: KroneckerFactors, x: jax.Array, g: jax.Array, deltas: jax.Array):
    """`||A Delta G||_1`, and the same of the empirical Fisher of tokens; `[K]` each."""

    def norms(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        kfac = factors.input_covariance @ delta @ factors.gradient_covariance
        slopes = ((x @ delta) * g).sum(-1, keepdims=True)
        return jnp.abs(kfac).sum(), jnp.abs((x * slopes).T @ g).sum() / len(x)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(norms, deltas)


def removals(config, block: Block, factors: dict[str, KroneckerFactors], count: int):
    """Deltas `[count + 1, D_in, D_out]` by site, the last all that `gradot` removes."""
    parts, terms, _ = propose(block, dict(factors), gradot_rule())
    counts = uniform_layer_counts(layer_pools(config, OPTIONS), OPTIONS, 1)
    orders, deltas = jax.device_get(layer_orders(terms, 0.0, 0.0)), {}

    def choose(hessian: jax.Array) -> np.ndarray:
        order = np.argsort(-np.asarray(hessian), kind="stable")
        return order[((np.arange(count) + 0.5) * len(order) / count).astype(int)]

    each = np.eye(len(orders.channels), dtype=np.float32)
    gone = each[orders.channels[counts.channels :]].sum(0)
    for site, weights in maps(block).items():
        kernel = np.asarray(weights.kernel)
        if site in parts:
            u, s, v = map(np.asarray, parts[site])
            own = [-s[k] * np.outer(u[:, k], v[:, k]) for k in choose(terms.components[site][0])]
            cut, _ = cut_rank(weights, parts[site], orders.components[site], counts.ranks[site])
            own.append(np.asarray(dense_kernel(cut)) - kernel)
        else:
            rows = [*each[choose(terms.channels.hessian)], gone]
            own = [-kernel * (r[:, None] if site == block.layout.channels.out else r) for r in rows]
        deltas[site] = jnp.asarray(np.stack(own), jnp.float32)
    return deltas


def compare(norms: dict[str, np.ndarray]) -> dict[str, Any]:
    """Norms of candidates and of the whole; of each kind how it agrees with the Hessian's."""
    found, exact = {}, norms["hessian"]
    alive = exact[:-1] > 0
    for name, own in norms.items():
        found[name] = {"candidates": own[:-1].tolist(), "whole": own[-1]}
        if name == "hessian":
            continue
        varies = min(len({*own[:-1]}), len({*exact[:-1]})) > 1
        ranks = float(spearmanr(own[:-1], exact[:-1]).statistic) if varies else None
        found[name]["rank_correlation"] = ranks
        if name != "magnitude":
            ratios = own[:-1][alive] / exact[:-1][alive]
            found[name]["ratio"] = float(np.median(ratios)) if alive.any() else None
            found[name]["whole_ratio"] = own[-1] / exact[-1] if exact[-1] else None
    return found


def study(config, params: Params, batch: Batch, layers: Sequence[int], count: int, out: Path, **of):
    """Measures some middle layers, by their number in the model, the top one first.

    The file is written after each and holds `of`; what it has already is not measured again.

    Raises:
        InputError: for a layer outside the middle, or a file of another measurement.
    """
    middle = range(SPLIT.num_bottom, params.num_layers - SPLIT.num_top)
    if not set(layers) <= set(middle):
        raise InputError(f"layers must lie in [{middle[0]}, {middle[-1]}], got {list(layers)}")
    forward = run_forward(config, params, SPLIT, [batch])
    record = {**of, "num_sequences": len(batch.input_ids), "length": batch.input_ids.shape[1]}
    record |= {"candidates": count, "budget": OPTIONS.budget}
    old = json.loads(out.read_text()) if out.exists() else record | {"loss": forward.loss}
    same_text = np.isclose(old["loss"], forward.loss, rtol=1e-4)
    if not same_text or any(old.get(key) != value for key, value in record.items()):
        raise InputError(f"{out.name}: is of another measurement")
    record |= {"layers": old.get("layers", {}), "loss": forward.loss, "environment": environment()}
    left = {number for number in layers if str(number) not in record["layers"]}
    inputs, finished = list(forward.boundaries), {n - middle[0] for n in middle if n not in left}
    for index, factors in sweep_middle(config, params, SPLIT, forward, finished=finished):
        number = index + middle[0]
        block = get_block(params.segments[0], number)
        here = config, params, number, inputs[index][0], jnp.asarray(batch.targets)
        rows, sites = token_rows(*here), {}
        zeros = {s: jnp.zeros((count + 1, *w.shape)) for s, w in maps(block).items()}
        for site, deltas in removals(config, block, factors, count).items():
            kfac, fisher = fisher_norms(factors[site], *rows[site], deltas)
            exact = hessian_norms(*here, zeros | {site: deltas})[site]
            norms = {"hessian": exact, "kfac": kfac, "fisher": fisher}
            norms["magnitude"] = jnp.linalg.norm(deltas, axis=(1, 2))
            sites[site] = compare({k: np.asarray(v, np.float64) for k, v in norms.items()})
        record["layers"][str(number)] = sites
        write_result(out, record)
        print(f"layer {number}", flush=True)


def draw(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Ratio and rank correlation against depth, a column per model and a line per site."""
    figure = Figure(figsize=(6 * len(records), 7), layout="tight")
    for axes, record in zip(
        figure.subplots(2, len(records), squeeze=False).T, records, strict=True
    ):
        numbers = sorted(map(int, record["layers"]))
        for site in record["layers"][str(numbers[0])]:
            for axis, (key, label) in zip(axes, _PANELS, strict=True):
                values = [record["layers"][str(n)][site]["kfac"][key] for n in numbers]
                axis.plot(numbers, np.array(values, float), marker="o", markersize=3, label=site)
                axis.set(xlabel="layer", ylabel=label)
        axes[0].set(title=record["model"], yscale="log")
        axes[0].axhline(1, color="grey", linestyle="--")
        axes[1].set_ylim(-0.5, 1.05)
        axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", type=Path, nargs="+", help="results to draw, instead")
    parser.add_argument("--model", default="bundled", help="a checkpoint folder, or `bundled`")
    parser.add_argument("--calibration", help="text; the bundled model has its own")
    parser.add_argument("--num-sequences", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--layers", nargs="+", default=["all"], help="numbers in the model")
    parser.add_argument("--candidates", type=int, default=12, help="a site")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.draw:
        return draw(given.out, [json.loads(path.read_text()) for path in given.draw])
    count, length = given.num_sequences, given.sequence_length
    folder = bundled_model() if given.model == "bundled" else Path(given.model)
    (config, params), tokenizer = load_model(folder), load_tokenizer(folder)
    try:
        if given.model == "bundled":
            size = {"num_sequences": count, "length": length}
            batch = calibration_examples(tokenizer, bundled_facts(), **size)
        else:
            batch = examples_of(tokenizer, config, read_records(given.calibration), length)
            batch = take(batch, slice(count))
        middle = map(str, range(SPLIT.num_bottom, params.num_layers - SPLIT.num_top))
        layers = [int(n) for n in (middle if given.layers == ["all"] else given.layers)]
        study(config, params, batch, layers, given.candidates, given.out, model=folder.name)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
