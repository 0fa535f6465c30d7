"""The fine-tuning step on CPU, beside its equivalent in PyTorch.

The equivalent has the same shapes, weights and batch and does what the step does: a frozen middle
of low-rank maps and pruned MLPs, gradients and moments for the adapter alone, clipping and AdamW;
by PyTorch's fused attention and fused optimiser, without dropout, cache or teacher. Each side runs
in a process of its own on the same CPUs, as many as there are threads, and they take turns, so
that whatever else the machine does meets all of them. Linux only.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import floor
from benchmarks.harness import Phase, new_process, timed
from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS, Suite
from gradot_jax.models.opt.block import Block, Shell
from gradot_jax.models.params import unstack_blocks
from gradot_jax.models.split import SplitModel
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.linear import Linear, LowRank
from gradot_jax.nn.norm import LayerNorm

Side = Literal["step_emulator", "step_full", "torch"]
"""Our step in the emulator and in the full model, and PyTorch's in the emulator."""

_WARM_UP = 5
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


def study(suite: Suite) -> Iterator[dict[str, Any]]:
    """The growing record, of the CPU suite alone: `measure_step` by threads, one and two."""
    del suite
    record: dict[str, Any] = {"torch": torch.__version__, "threads": {}, "complete": False}
    available = len(os.sched_getaffinity(0))
    for threads in range(1, min(available, 2) + 1):
        record["threads"][str(threads)] = measure_step(threads)
        yield record
    yield record | {"complete": True}


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
        processes = {
            side: stack.enter_context(new_process(_start, side, workload, threads))
            for side in seconds
        }
        for _ in range(rounds):
            for side, process in processes.items():
                seconds[side] += process.submit(_turn, side, workload).result()
    median = {side: statistics.median(times) for side, times in seconds.items()}
    shape = WORKLOADS["cpu"][workload]
    blocks = (floor.block_weights(shape), floor.emulator_block_weights(shape))
    full, emulator = (floor.step_cost(shape, weights).flops for weights in blocks)
    speedup, ratio = median["step_full"] / median["step_emulator"], full / emulator
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


def _start(side: Side, workload: str, threads: int) -> None:
    """Limits a process and makes its step."""
    # Before the first computation: XLA has as many threads as there are CPUs for it then.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    _warm_step(side, workload)


def _turn(side: Side, workload: str) -> list[float]:
    """Seconds of some steps."""
    step = _warm_step(side, workload)
    return [timed(step)[0] for _ in range(_TURN)]


@cache
def _warm_step(side: Side, name: str) -> Callable[[], Any]:
    """A step of one of the sides, made once in a process."""
    workload = WORKLOADS["cpu"][name]
    if side == "torch":
        model = to_torch(workload.emulator(), workload.config.num_attention_heads)
        step = make_step(model, workload.batches()[0])
    else:
        step = _own_step(PHASES[side](workload))
    for _ in range(_WARM_UP):
        step()
    return step


def _own_step(phase: Phase) -> Callable[[], Any]:
    arguments = phase.prepare()

    def step() -> Any:
        nonlocal arguments
        result = phase.run(*arguments)
        arguments = phase.advance(arguments, result)
        return result

    return step
