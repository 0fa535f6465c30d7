"""Reading the values of a `config.json`, each of which has a type and a range."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gradot_jax.errors import InputError

_LIMIT = 2**31
_LARGEST = 1e12
_REQUIRED: Any = object()


class ConfigValues(NamedTuple):
    """The values of a file; each reader raises InputError for what is not of its kind.

    A reader with a default gives it where the value is absent or null.

    Attributes:
        values: by name.
        where: the file, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def whole(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """A whole number from `least` to 2^31 - 1."""
        fits = lambda value: type(value) is int and least <= value < _LIMIT  # noqa: E731
        return self._read(name, default, fits, f"a whole number in [{least}, 2^31)")

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number above 0."""
        fits = lambda value: type(value) in (int, float) and 1e-12 <= value < _LARGEST  # noqa: E731
        return self._read(name, default, fits, f"a finite number above 0, in [1e-12, {_LARGEST:g})")

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        return self._read(name, default, lambda value: type(value) is bool, "true or false")

    def tokens(self, name: str) -> tuple[int, ...]:
        """Token ids: none, one, or a list of at most 64."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 64 or not all(type(i) is int and 0 <= i < _LIMIT for i in ids):
            raise self.refused(name, "a token id, or a list of at most 64")
        return tuple(dict.fromkeys(ids))

    def expect(self, name: str, *allowed: Any) -> None:
        """Raises InputError for any other value than those."""
        if self.values.get(name) not in allowed:
            shown = [str(value) for value in allowed if value is not None]
            raise self.refused(name, " or ".join(shown) or "none")

    def refused(self, name: str, expected: str) -> InputError:
        """What to raise for a value."""
        got = f"{self.values.get(name)!r}"
        shown = got if len(got) <= 80 else f"{got[:77]}..."
        return InputError(f"{self.where}: {name} is {shown}, expected {expected}")

    def _read(self, name: str, default: Any, fits, expected: str) -> Any:
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not fits(value):
            raise self.refused(name, expected)
        return value
