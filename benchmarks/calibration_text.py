"""How much text a calibration needs, which, and whether the first position belongs in it.

    python -m benchmarks.calibration_text --model smollm2 \
        --text documents=real_data/calibration/documents.jsonl gcide=real_data/gcide/train.jsonl \
        --out calibration

For each text, number of sequences and draw, `gradot` at one budget with and without the first
position of each sequence: the gap of the losses and the error of the adapter's gradient, on
sequences of the first text that no draw takes. OUT holds a file for each that is finished, and
`result.json`.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradot_jax.cli.data import open_tokenizer, training_examples
from gradot_jax.comparison.cells import CellStore
from gradot_jax.comparison.compressing import CompressionCell
from gradot_jax.comparison.question_sets import question_testbed
from gradot_jax.comparison.stages import Case
from gradot_jax.comparison.testbed import Testbed
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment, write_result
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.checkpoint import load_model
from gradot_jax.nn.batch import Batch

_MEASURED = ("loss_gap", "gradient_relative_error", "gradient_cosine", "seconds")


def testbeds(
    name: str, config, params, texts: Mapping[str, Batch], count: int
) -> dict[str, Testbed]:
    """A testbed by text, whose draws have so many sequences; all share one held-out text."""
    beds = {
        text: question_testbed(
            name, config, params, (), examples, num_sequences=count, batch_size=8
        )
        for text, examples in texts.items()
    }
    held_out = next(iter(beds.values())).held_out
    return {text: dataclasses.replace(bed, held_out=held_out) for text, bed in beds.items()}


def study(
    name: str,
    config,
    params,
    texts: Mapping[str, Batch],
    *,
    counts: Sequence[int],
    draws: int,
    skips: Sequence[int],
    budget: float,
    out: Path,
) -> list[dict[str, Any]]:
    """What `gradot` makes of each calibration; the others than the first text at one size alone."""
    store, rows = CellStore(out / "cells"), []
    for count in counts:
        for text, bed in testbeds(name, config, params, texts, count).items():
            if text != next(iter(texts)) and count != counts[len(counts) // 2]:
                continue
            for draw in range(draws):
                for skip in skips:
                    options = {"seed": draw, "skip_positions": skip, "budget": budget}
                    case = Case(f"gradot-{text}-{count}-{skip}", budget, draw)
                    cell = CompressionCell(
                        bed, store, out / "bundles", case, CompressionOptions(**options)
                    )
                    found = cell.record()["result"]
                    cell.drop()
                    where = {"text": text, "sequences": count, "draw": draw, "skip_positions": skip}
                    rows.append(where | {key: found[key] for key in _MEASURED})
                    print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--text", nargs="+", required=True, help="NAME=DATA, the first held out")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64, 256], help="sequences")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--skip-positions", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        config, params = load_model(Path(given.model), dtype="float32")
        tokenizer = open_tokenizer(Path(given.model), config)
        texts = dict(text.split("=", 1) for text in given.text)
        rows = study(
            given.model,
            config,
            params,
            {
                name: training_examples(tokenizer, config, source, given.sequence_length)
                for name, source in texts.items()
            },
            counts=given.counts,
            draws=given.draws,
            skips=given.skip_positions,
            budget=given.budget,
            out=given.out,
        )
    except (InputError, ValueError) as error:
        parser.error(str(error))
    record = {"model": Path(given.model).name, "budget": given.budget, "rows": rows}
    write_result(given.out / "result.json", {**record, "environment": environment()})


if __name__ == "__main__":
    main()
