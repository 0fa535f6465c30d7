"""The model owner's folder: the record of a compression, which never leaves the house.

It has the indices that were kept, the scores and what calibrated them. Nothing that writes a
bundle or an adapter accepts any of these.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradot_jax.compression.plan import Plan
from gradot_jax.errors import InputError
from gradot_jax.files.folder import output_folder, regular_file
from gradot_jax.files.safetensors import write_tensors
from gradot_jax.files.strict_json import read_json, write_json

PLAN_FILE = "plan.json"
SCORES_FILE = "scores.safetensors"
CALIBRATION_FILE = "calibration.json"
BUNDLE_DIGEST = "bundle_digest"


def save_owner(
    path: str | Path,
    plan: Plan,
    scores: Mapping[str, np.ndarray],
    calibration: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes the model owner's folder; it appears whole or not at all, see `output_folder`.

    Args:
        path: the folder to make.
        plan: what each layer keeps.
        scores: arrays by name; a method that scores nothing leaves no file of them.
        calibration: JSON values that record the calibration, and the shipped bundle's digest as
            `bundle_digest`.
        overwrite: replace an existing folder.

    Raises:
        InputError: when `path` may not be written.
    """
    with output_folder(path, overwrite=overwrite) as folder:
        (folder / PLAN_FILE).write_text(plan.to_json())
        if scores:
            write_tensors(folder / SCORES_FILE, scores)
        write_json(folder / CALIBRATION_FILE, dict(calibration))


def load_bundle_digest(path: str | Path) -> str:
    """The digest of the bundle that an owner's folder belongs to.

    Raises:
        InputError: when the folder's record is missing, damaged or names none.
    """
    file = regular_file(Path(path), CALIBRATION_FILE)
    digest = read_json(file).get(BUNDLE_DIGEST)
    if not isinstance(digest, str):
        raise InputError(f"{file}: {BUNDLE_DIGEST} is {digest!r}, expected the digest of a bundle")
    return digest


def load_plan(path: str | Path) -> Plan:
    """The plan in an owner's folder.

    Raises:
        InputError: when there is none, or it is damaged.
    """
    file = regular_file(Path(path), PLAN_FILE)
    try:
        return Plan.from_json(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
