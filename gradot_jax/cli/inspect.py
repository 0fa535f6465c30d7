"""`gradot inspect`: what a folder holds."""

import dataclasses
from pathlib import Path

import tyro

from gradot_jax.cli.common import Debuggable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Debuggable):
    """Shows what a bundle, an adapter or a checkpoint holds, and whether its digests agree.

    Example: gradot inspect opt-1.3b-offsite/bundle

    Attributes:
        path: the folder.
    """

    path: tyro.conf.Positional[Path]

    def run(self) -> None:
        """Executes the command."""
        from gradot_jax.offsite.describe import describe

        lines = describe(self.path)
        width = max(map(len, lines))
        for label, value in lines.items():
            print(f"{label:<{width}}  {value}")
