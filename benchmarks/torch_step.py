"""The fine-tuning step on CPU, beside its equivalent in PyTorch.

The equivalent has the same shapes, weights and batch and does what the step does: a frozen middle
of low-rank maps and pruned MLPs, gradients and moments for the adapter alone, clipping and AdamW;
by PyTorch's fused attention and fused optimiser, without dropout, cache or teacher. Each side runs
in a process of its own on the same CPUs, as many as there are threads, and they take turns, so
that whatever else the machine does meets all of them. In the first turn both sides must come to the
same losses. Linux only.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import floor
from benchmarks.harness import Phase, measure_rates, new_process, timed
from benchmarks.phases import PHASES
from benchmarks.workloads import WORKLOADS, Suite
from gradot_jax.models import llama, opt
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import unstack_blocks
from gradot_jax.models.split import SplitModel
from gradot_jax.nn.batch import Batch
from gradot_jax.nn.layout import Block
from gradot_jax.nn.linear import Linear, LowRank
from gradot_jax.nn.norm import LayerNorm
from gradot_jax.nn.rotary import frequencies

Side = Literal["step_emulator", "step_full", "torch"]
"""Our step in the emulator and in the full model, and PyTorch's in the emulator."""

_WARM_UP = 5
_TURN = 3
"""Steps at a time."""

_SAME_LOSS = 1e-4
"""Relative difference below which two losses are the same, rounded otherwise."""


class Turn(NamedTuple):
    """Seconds of some steps, and the loss before each."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]


class TorchModel(NamedTuple):
    """A model whose leaves are tensors, matrices as PyTorch has them, `[D_out, D_in]`.

    Attributes:
        config: with tied embeddings.
        shell: of its family.
        blocks: all, in depth order.
        adapter: those of them that are trained.
    """

    config: ModelConfig
    shell: Any
    blocks: list[Block]
    adapter: list[Block]


def to_torch(config: ModelConfig, model: SplitModel) -> TorchModel:
    """Copies a model without inner blocks; the adapter's tensors require a gradient."""

    def tensors(stacks: Sequence[Any]) -> list[Block]:
        return [jax.tree.map(_tensor, block) for block in unstack_blocks(stacks)]

    bottom, top = tensors([model.adapter.bottom]), tensors([model.adapter.top])
    for leaf in jax.tree.leaves((bottom, top)):
        leaf.requires_grad_()
    shell = jax.tree.map(_plain_tensor, model.shell)
    return TorchModel(config, shell, bottom + tensors(model.middle) + top, bottom + top)


def mean_loss(model: TorchModel, batch: Batch) -> torch.Tensor:
    """Nats per token of a batch whose every token is real and counted."""
    hidden = _FORWARD[model.config.family.label](model, _ids(batch.input_ids))
    logits = F.linear(hidden, model.shell.embed_tokens)
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


def _opt(model: TorchModel, ids: torch.Tensor) -> torch.Tensor:
    shell, heads = model.shell, model.config.num_attention_heads
    hidden = shell.embed_tokens[ids] + shell.embed_positions[2 : 2 + ids.shape[1]]
    for block in model.blocks:
        x = _norm(block.self_attn_layer_norm, hidden)
        maps = (block.q_proj, block.k_proj, block.v_proj)
        parts = (_linear(site, x).unflatten(2, (heads, -1)).transpose(1, 2) for site in maps)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + _linear(block.out_proj, mixed.transpose(1, 2).flatten(2))
        x = _norm(block.final_layer_norm, hidden)
        hidden = hidden + _linear(block.fc2, F.relu(_linear(block.fc1, x)))
    return _norm(shell.final_layer_norm, hidden)


def _llama(model: TorchModel, ids: torch.Tensor) -> torch.Tensor:
    config, length = model.config, ids.shape[1]
    planes = torch.from_numpy(frequencies(config.rotary, length))
    angles = torch.arange(length)[:, None] * planes
    cosine, sine = angles.cos(), angles.sin()

    def norm(weights: Any, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weights.scale, config.rms_norm_eps)

    def heads(weights: Linear, x: torch.Tensor) -> torch.Tensor:
        return _linear(weights, x).unflatten(2, (-1, config.head_dim)).transpose(1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)

    hidden = model.shell.embed_tokens[ids]
    for block in model.blocks:
        x = norm(block.input_layernorm, hidden)
        query, key = turn(heads(block.q_proj, x)), turn(heads(block.k_proj, x))
        mixed = F.scaled_dot_product_attention(
            query, key, heads(block.v_proj, x), is_causal=True, enable_gqa=True
        )
        hidden = hidden + _linear(block.o_proj, mixed.transpose(1, 2).flatten(2))
        x = norm(block.post_attention_layernorm, hidden)
        x = F.silu(_linear(block.gate_proj, x)) * _linear(block.up_proj, x)
        hidden = hidden + _linear(block.down_proj, x)
    return norm(model.shell.norm, hidden)


_FORWARD = {opt.OPT.label: _opt, llama.LLAMA.label: _llama}
"""From token ids `[B, T]` to what the head reads, `[B, T, D]`, by family."""


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


def study(suite: Suite, workload: str = "small", rounds: int = 7) -> Iterator[dict[str, Any]]:
    """The growing record, of the CPU suite alone: `measure_step` by threads, one and two."""
    shape = WORKLOADS[suite][workload].describe()
    record: dict[str, Any] = {"torch": torch.__version__, "workload": shape}
    record |= {"threads": {}, "complete": False}
    available = len(os.sched_getaffinity(0))
    for threads in range(1, min(available, 2) + 1):
        record["threads"][str(threads)] = measure_step(threads, workload, rounds)
        yield record
    yield record | {"complete": True}


study_smollm2 = partial(study, workload="smollm2-135m", rounds=3)
"""The same at the shape of SmolLM2-135M."""


def measure_step(threads: int, workload: str, rounds: int) -> dict[str, Any]:
    """Measures all sides in turns.

    Args:
        threads: of each side, and CPUs that it may use.
        workload: of the CPU suite.
        rounds: turns of each side, of three steps.

    Returns:
        `median_seconds` and `tokens_per_second` by side; `over_torch`, our throughput over
        PyTorch's; `speedup`, that of the emulator over the full model; `flop_ratio`, what the
        speed-up would be if time were arithmetic; and `speedup_share` of it. `losses` of the first
        turn; `rates` on as many CPUs; and `fraction_of_floor` by side.

    Raises:
        ValueError: where PyTorch's losses are not those of our step in the emulator.
    """
    turns: dict[Side, list[Turn]] = {side: [] for side in get_args(Side)}
    shape = WORKLOADS["cpu"][workload]
    with contextlib.ExitStack() as stack:
        processes = {
            side: stack.enter_context(new_process(_start, side, workload, threads))
            for side in turns
        }
        rates = processes["step_emulator"].submit(measure_rates, shape).result()
        for _ in range(rounds):
            for side, process in processes.items():
                turns[side].append(process.submit(_turn, side, workload).result())
    losses = {side: own[0].losses for side, own in turns.items()}
    if not np.allclose(losses["torch"], losses["step_emulator"], rtol=_SAME_LOSS, atol=0):
        raise ValueError(f"the losses of both sides differ: {losses}")
    median = {
        side: statistics.median(time for turn in own for time in turn.seconds)
        for side, own in turns.items()
    }
    full, emulator = (
        floor.step_cost(shape, weights(shape))
        for weights in (floor.block_weights, floor.emulator_block_weights)
    )
    cost = {"step_emulator": emulator, "step_full": full, "torch": emulator}
    speedup, ratio = median["step_full"] / median["step_emulator"], full.flops / emulator.flops
    return {
        "threads": threads,
        "steps": rounds * _TURN,
        "losses": losses,
        "rates": rates,
        "median_seconds": median,
        "tokens_per_second": {side: shape.tokens / time for side, time in median.items()},
        "fraction_of_floor": {
            side: floor.floor_seconds(cost[side], rates) / time for side, time in median.items()
        },
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


def _turn(side: Side, workload: str) -> Turn:
    step = _warm_step(side, workload)
    seconds, losses = zip(*(timed(step) for _ in range(_TURN)), strict=True)
    return Turn(seconds, tuple(map(float, losses)))


@cache
def _warm_step(side: Side, name: str) -> Callable[[], Any]:
    """A step of one of the sides, made once in a process, that returns the loss before it."""
    workload = WORKLOADS["cpu"][name]
    if side == "torch":
        model = to_torch(workload.config, workload.emulator())
        step = make_step(model, workload.batches()[0])
    else:
        step = _own_step(PHASES[side](workload))
    for _ in range(_WARM_UP):
        step()
    return step


def _own_step(phase: Phase) -> Callable[[], jax.Array]:
    arguments = phase.prepare()

    def step() -> jax.Array:
        nonlocal arguments
        result = phase.run(*arguments)
        arguments = phase.advance(arguments, result)
        return jax.block_until_ready(result)[1].loss

    return step
