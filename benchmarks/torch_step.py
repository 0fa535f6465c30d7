"""The fine-tuning step on CPU, beside its equivalent in PyTorch.

    python -m benchmarks.torch_step --threads 1 2

The equivalent has the same shapes, weights and batch and does what the step does: a frozen middle
of low-rank maps and pruned MLPs, gradients and moments for the adapter alone, clipping and AdamW;
by PyTorch's fused attention and fused optimiser, without dropout, cache or teacher. Each side runs
in a process of its own on the same CPUs, as many as there are threads, and they take turns, so
that whatever else the machine does meets all of them. Linux only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.harness import timed
from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS, Suite, Workload
from gradot_jax.models.opt.params import Block, Shell, unstack_blocks
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import Linear, LowRank
from gradot_jax.nn.norm import LayerNorm
from gradot_jax.offsite.emulator import SplitModel

Side = Literal["step_emulator", "step_full", "torch"]
"""Our step in the emulator and in the full model, and PyTorch's in the emulator."""

_ROOT = Path(__file__).parents[1]
_WARM_UP = 2
_TURN = 3
"""Steps at a time."""


class TorchModel(NamedTuple):
    """A model whose leaves are tensors, matrices as PyTorch has them, `[D_out, D_in]`.

    Attributes:
        shell: with tied embeddings.
        blocks: all, in depth order.
        adapter: those of them that are trained.
        num_heads: H.
    """

    shell: Shell
    blocks: list[Block]
    adapter: list[Block]
    num_heads: int


def to_torch(model: SplitModel, num_heads: int) -> TorchModel:
    """Copies a model without inner blocks; the adapter's tensors require a gradient."""

    def tensors(stacks: Sequence[Any]) -> list[Block]:
        return [jax.tree.map(_tensor, block) for block in unstack_blocks(stacks)]

    bottom, top = tensors([model.adapter.bottom]), tensors([model.adapter.top])
    for leaf in jax.tree.leaves((bottom, top)):
        leaf.requires_grad_()
    shell = jax.tree.map(_plain_tensor, model.shell)
    return TorchModel(shell, bottom + tensors(model.middle) + top, bottom + top, num_heads)


def mean_loss(model: TorchModel, batch: Batch) -> torch.Tensor:
    """Nats per token of a batch whose every token is real and counted."""
    shell, ids = model.shell, _ids(batch.input_ids)
    hidden = shell.embed_tokens[ids] + shell.embed_positions[2 : 2 + ids.shape[1]]
    for block in model.blocks:
        hidden = _block(block, hidden, model.num_heads)
    logits = F.linear(_norm(shell.final_layer_norm, hidden), shell.embed_tokens)
    return F.cross_entropy(logits.flatten(0, 1), _ids(batch.targets).flatten())


def make_step(model: TorchModel, batch: Batch) -> Callable[[], float]:
    """A fine-tuning step on one batch, which returns the loss before it."""
    trained = jax.tree.leaves(model.adapter)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step


def _block(block: Block, hidden: torch.Tensor, num_heads: int) -> torch.Tensor:
    x = _norm(block.self_attn_layer_norm, hidden)
    maps = (block.q_proj, block.k_proj, block.v_proj)
    heads = (_linear(site, x).unflatten(2, (num_heads, -1)).transpose(1, 2) for site in maps)
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
    hidden = hidden + _linear(block.out_proj, mixed.transpose(1, 2).flatten(2))
    x = _norm(block.final_layer_norm, hidden)
    return hidden + _linear(block.fc2, F.relu(_linear(block.fc1, x)))


def _linear(weights: Linear, x: torch.Tensor) -> torch.Tensor:
    if isinstance(weights, LowRank):
        return F.linear(F.linear(x, weights.left), weights.right, weights.bias)
    return F.linear(x, weights.kernel, weights.bias)


def _norm(weights: LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights.scale, weights.bias)


def _tensor(leaf: jax.Array) -> torch.Tensor:
    return _plain_tensor(leaf.T)


def _plain_tensor(leaf: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(leaf, order="C"))


def _ids(ids: jax.Array) -> torch.Tensor:
    return _plain_tensor(ids).long()


def measure_step(threads: int, workload: str = "small", rounds: int = 7) -> dict[str, Any]:
    """Measures all sides in turns.

    Args:
        threads: of each side, and CPUs that it may use.
        workload: of the CPU suite.
        rounds: turns of each side, of three steps.

    Returns:
        `median_seconds` and `tokens_per_second` by side; `over_torch`, our throughput over
        PyTorch's; `speedup`, that of the emulator over the full model; `flop_ratio`, what the
        speed-up would be if time were arithmetic; and `speedup_share` of it.
    """
    seconds: dict[Side, list[float]] = {side: [] for side in get_args(Side)}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(_worker(side, workload, threads)) for side in seconds}
        for _ in range(rounds):
            for side, turn in workers.items():
                seconds[side] += turn()
    shape = WORKLOADS["cpu"][workload]
    median = {side: statistics.median(times) for side, times in seconds.items()}
    flops = {side: PHASES[side](shape).cost.flops for side in ("step_emulator", "step_full")}
    speedup = median["step_full"] / median["step_emulator"]
    ratio = flops["step_full"] / flops["step_emulator"]
    return {
        "threads": threads,
        "steps": rounds * _TURN,
        "median_seconds": median,
        "tokens_per_second": {side: shape.tokens / time for side, time in median.items()},
        "over_torch": median["torch"] / median["step_emulator"],
        "speedup": speedup,
        "flop_ratio": ratio,
        "speedup_share": speedup / ratio,
    }


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record: `measure_step` for one thread and for two, by their number."""
    if suite != "cpu":
        raise ValueError(f"the step in PyTorch is measured on CPU alone, got suite {suite}")
    record: dict[str, Any] = {"torch": torch.__version__, "threads": {}, "complete": False}
    available = len(os.sched_getaffinity(0))
    for threads in range(1, min(available, 2) + 1):
        record["threads"][str(threads)] = measure_step(threads)
        yield record
    yield record | {"complete": True}


@contextlib.contextmanager
def _worker(side: Side, workload: str, threads: int) -> Iterator[Callable[[], list[float]]]:
    """A process that is ready to run a side; yields what makes it take a turn, in seconds."""
    command = [sys.executable, "-m", "benchmarks.torch_step", "--worker", side]
    command += ["--workload", workload, "--threads", str(threads)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def turn() -> list[float]:
            print("go", file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        turn()
        yield turn


def _work(side: Side, workload: Workload, threads: int) -> None:
    """Takes a turn for each line that comes in."""
    # Before the first computation: XLA has as many threads as there are CPUs for it then.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    step = _torch_side(workload) if side == "torch" else _own_side(side, workload)
    for _ in range(_WARM_UP):
        step()
    for _ in sys.stdin:
        print(json.dumps([timed(step)[0] for _ in range(_TURN)]), flush=True)


def _torch_side(workload: Workload) -> Callable[[], Any]:
    model = to_torch(workload.emulator(), workload.config.num_attention_heads)
    return make_step(model, workload.batches()[0])


def _own_side(side: Side, workload: Workload) -> Callable[[], Any]:
    phase = PHASES[side](workload)
    arguments = phase.prepare()

    def step() -> Any:
        nonlocal arguments
        result = phase.run(*arguments)
        arguments = phase.advance(arguments, result)
        return result

    return step


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--workload", default="small", choices=WORKLOADS["cpu"])
    parser.add_argument("--worker", choices=get_args(Side), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker, WORKLOADS["cpu"][options.workload], options.threads[0])
        return
    records = {str(n): measure_step(n, options.workload) for n in options.threads}
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
