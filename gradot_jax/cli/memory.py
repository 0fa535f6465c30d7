"""What to do when a command runs out of memory."""

from gradot_jax.cli.common import Debuggable

_ADVICE = {
    "remat": "--remat",
    "offload": "--offload",
    "accumulate": "--accumulate with --batch-size divided by it, for the same updates",
    "batch_size": "a smaller --batch-size",
    "sequence_length": "a smaller --sequence-length",
    "num_sequences": "a smaller --num-sequences",
    "dtype": "--dtype bfloat16",
    "mesh": "--mesh, which spreads weights and batches over more devices",
}
"""By field of a command, the cheapest first."""

_USED = {"remat": True, "offload": True, "dtype": "bfloat16"}


def memory_advice(command: Debuggable | None) -> str:
    """The options of a command that make it need less memory, but for those already used."""
    able = getattr(command, "MEMORY", ())
    used = [field for field, value in _USED.items() if getattr(command, field, None) == value]
    unused = [_ADVICE[field] for field in _ADVICE if field in able and field not in used]
    tried = (
        f"these need less of it: {'; '.join(unused)}" if unused else "a smaller model needs less"
    )
    return f"out of memory; {tried}"
