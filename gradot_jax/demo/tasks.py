"""Downstream tasks of the bundled model, each with train, development and test parts."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Parts:
    """Documents or items of one task.

    Attributes:
        train: to fine-tune on.
        development: to choose settings with.
        test: to report.
    """

    train: list
    development: list
    test: list


def split_prose(documents: list[str]) -> Parts:
    """Reference prose: a quarter test, an eighth development, the rest train."""
    quarter, eighth = len(documents) // 4, len(documents) // 8
    return Parts(
        train=documents[quarter + eighth :],
        development=documents[quarter : quarter + eighth],
        test=documents[:quarter],
    )
