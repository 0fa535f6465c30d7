"""Checkpoints of a run: Orbax keeps the arrays, a manifest of digests keeps them honest.

Orbax commits a step whole or not at all, but returns wrong values without an error when a bit of
them has flipped on disk. So each step's folder also gets a manifest with the SHA-256 of its files,
written last: a step without one, or that does not match it, is no checkpoint, and the step before
is taken instead. The manifest also says what the run was, so that another run cannot resume it.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradot_jax.errors import InputError
from gradot_jax.files.digest import file_digest, json_digest, leaf_name
from gradot_jax.parallel import agree, is_writer, one_writer

MANIFEST = "gradot_manifest.json"

_NO_STEP = -1


class Checkpoint(NamedTuple):
    """What was saved at one step.

    Attributes:
        step: steps taken.
        state: the tree of arrays.
        notes: JSON values saved beside it.
    """

    step: int
    state: Any
    notes: dict[str, Any]


class CheckpointStore:
    """A folder of checkpoints of one run; a context manager.

    Saving blocks until the step is on disk, so an error surfaces where it happened and the arrays
    may be donated at once.

    Args:
        folder: made if need be.
        identity: JSON values, nested or not, that must be equal for a run to be resumed.
        keep: newest steps kept; two, so that a damaged one has a good one behind it.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any], *, keep: int = 2):
        # Imported here because it costs half a second that only runs with checkpoints need.
        from orbax.checkpoint import v1

        self.folder = Path(folder).absolute()
        self._identity = json.loads(json.dumps(dict(identity)))
        with _quiet():
            self._orbax = v1.training.Checkpointer(
                self.folder,
                preservation_policy=v1.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except Exception:
            # Orbax repeats at the end what `save` has already raised.
            if kind is None:
                raise

    def close(self) -> None:
        """Releases Orbax's threads; nothing is pending by then."""
        with _quiet():
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Saved steps, ascending, damaged ones included."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(self, step: int, state, notes: Mapping[str, Any] | None = None) -> None:
        """Saves a tree of arrays, and JSON values beside it.

        Raises:
            OSError: when it could not be written; earlier steps are as they were.
        """
        arrays = _named_arrays(state)
        try:
            with _quiet():
                self._orbax.save(step, arrays, force=True, overwrite=True)
            with one_writer(self.folder / str(step)) as writes:
                if writes:
                    self._write_manifest(step, arrays, dict(notes or {}))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise OSError(f"{self.folder}: step {step} could not be saved: {reason}") from error

    def restore(self, like) -> Checkpoint | None:
        """The newest intact checkpoint, or None when there is none at all.

        Damaged newer steps are named in a warning and deleted.

        Args:
            like: a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, that says what is
                expected and where it goes.

        Raises:
            InputError: when every step is damaged, or the checkpoint belongs to another run.
        """
        steps, damaged = self.steps, {}
        step = agree(self._newest_intact(damaged) if is_writer() else _NO_STEP)
        if step == _NO_STEP:
            if steps:
                raise InputError(f"{self.folder}: no checkpoint is intact: {_listed(damaged)}")
            return None
        manifest = _read_manifest(self.folder / str(step))
        self._check_same_run(step, manifest, like)
        self._discard([bad for bad in steps if bad > step], damaged, step)
        return Checkpoint(step, self._load(step, like), manifest["notes"])

    def _newest_intact(self, damaged: dict[int, str]) -> int:
        """Found by one process for all, because it reads every file; notes what is damaged."""
        for step in reversed(self.steps):
            try:
                _verify(self.folder / str(step))
            except _DamagedError as damage:
                damaged[step] = str(damage)
            else:
                return step
        return _NO_STEP

    def _load(self, step: int, like):
        expected = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named_arrays(like).items()
        }
        with _quiet():
            arrays = self._orbax.load(step, expected)

        def pick(path, leaf):
            if leaf.size:
                return arrays[leaf_name(path)]
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

        return jax.tree_util.tree_map_with_path(pick, like)

    def _discard(self, steps: Sequence[int], damaged: Mapping[int, str], step: int) -> None:
        if damaged:
            warnings.warn(
                f"{self.folder}: going back to step {step}, newer checkpoints are damaged: "
                f"{_listed(damaged)}",
                RuntimeWarning,
                stacklevel=3,
            )
        with _quiet():
            for bad in steps:
                self._orbax.delete(bad)

    def _check_same_run(self, step: int, manifest: Mapping[str, Any], like) -> None:
        saved = {"identity": manifest["identity"], "arrays": manifest["arrays"]}
        now = {"identity": self._identity, "arrays": _described(_named_arrays(like))}
        differences = list(_differences(saved, now))
        if differences:
            more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
            raise InputError(
                f"{self.folder}: the checkpoint of step {step} belongs to another run: "
                f"{'; '.join(differences[:8])}{more}"
            )

    def _write_manifest(self, step: int, arrays: Mapping[str, Any], notes: dict[str, Any]) -> None:
        folder = self.folder / str(step)
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        body = {
            "identity": self._identity,
            "notes": notes,
            "arrays": _described(arrays),
            "versions": {name: version(name) for name in ("jax", "optax", "orbax-checkpoint")},
            "files": {path.relative_to(folder).as_posix(): file_digest(path) for path in files},
        }
        partial = folder / f"{MANIFEST}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"sha256": json_digest(body), "body": body}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / MANIFEST)


class _DamagedError(Exception):
    """A step's folder is not what was written."""


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        body = manifest["body"]
        intact = manifest["sha256"] == json_digest(body)
    except FileNotFoundError:
        raise _DamagedError("its manifest is missing") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _DamagedError("its manifest is damaged")
    return body


def _verify(folder: Path) -> None:
    for name, expected in _read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise _DamagedError(f"{name} is missing")
        if file_digest(path) != expected:
            raise _DamagedError(f"{name} is not what was written")


def _named_arrays(tree) -> dict[str, Any]:
    """Leaves by path, without empty ones (an adapter without a top): Orbax refuses those."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(path): leaf for path, leaf in leaves if leaf.size}


def _described(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _differences(saved, now, where: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in saved | now:
            yield from _differences(saved.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif saved != now:
        yield f"{where} was {saved}, now {now}"


def _listed(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes Orbax's log, which prints screens for one error; the error itself is still raised."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)
