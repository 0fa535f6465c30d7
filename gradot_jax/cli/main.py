"""Entry point of the `gradot` program: parsing, errors and exit codes, without JAX."""

import logging
import sys
from collections.abc import Sequence

import tyro

from gradot_jax import __version__
from gradot_jax.cli.common import Debuggable
from gradot_jax.cli.compare import Compare
from gradot_jax.cli.compress import Compress
from gradot_jax.cli.convert import Convert
from gradot_jax.cli.demo import Demo
from gradot_jax.cli.evaluate import Evaluate
from gradot_jax.cli.export import Export
from gradot_jax.cli.finetune import Finetune
from gradot_jax.cli.generate import Generate
from gradot_jax.cli.inspect import Inspect
from gradot_jax.cli.memory import memory_advice
from gradot_jax.cli.plug_in import PlugIn
from gradot_jax.errors import InputError, out_of_memory

DONE, FAILED, USAGE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130

_LONGEST_REASON = 200
"""Characters of what XLA says about lack of memory, which may be pages of buffers."""

Command = (
    Demo | Convert | Compare | Compress | Finetune | PlugIn | Evaluate | Generate | Export | Inspect
)
"""Each is called by the name of its class, in small letters with hyphens."""

DESCRIPTION = """Offsite-tuning of language models without training the emulator (GradOT).

The owner of a model compresses its middle and ships a bundle (compress); the owner of data tunes
the adapter in it and returns that (finetune); the model's owner puts it around the original
middle (plug-in). Everything in between can be measured (evaluate), asked (generate), looked at
(inspect) and turned into a plain checkpoint (export), as can a GGUF file (convert). `gradot demo`
shows all of it on a small bundled model, and `gradot compare` measures every method, on that model
or on any other. `gradot --version` says which version this is.

Exit codes: 0 done, 1 failed, 2 usage, 3 refused input (of a comparison: some of it), 130
interrupted, 143 told to end (fine-tuning saves its state, compression what it has in
--checkpoints)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("gradot_jax").setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = None
    if arguments == ["--version"]:
        print(f"gradot {__version__}")
        return DONE
    try:
        command = tyro.cli(
            Command,
            prog="gradot",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run()
    except KeyboardInterrupt:
        print("gradot: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(f"gradot: error: {_paragraph(error, command)}", file=sys.stderr)
        refused = isinstance(error, InputError)
        return REFUSED if refused else getattr(error, "exit_code", FAILED)
    return DONE


def _paragraph(error: Exception, command: Debuggable | None) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if out_of_memory(error):
        return f"{memory_advice(command)} ({text[:_LONGEST_REASON]})"
    return f"{type(error).__name__}: {text}"


def program() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    program()
