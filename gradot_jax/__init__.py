"""GradOT in JAX: training-free, gradient-preserving offsite-tuning of language models.

The public functional API is listed in `__init__.pyi`. Each name is loaded when it is first used,
so that importing the package costs nothing and the command line answers at once.
"""

import ast
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_MODULES = {
    alias.name: f"{__name__}.{statement.module}"
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8")).body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}
"""Where each public name is defined: the stub is the one list of them."""


def __getattr__(name: str):
    if name == "__all__":
        return sorted(_MODULES)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*_MODULES, "__version__"]
