"""Texts of the bundled model: standard-library sources, reference prose, and two worlds of facts.

Sources and prose are read from the running Python; the facts that the bundled model learnt come
from the table beside its weights, since module contents differ between Python versions.
"""

import dataclasses
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

_PRUNED = frozenset(
    "test tests idlelib lib2to3 site-packages dist-packages __pycache__ pydoc_data encodings "
    "turtledemo ensurepip msilib".split()
)

API_SENTENCES = (
    "{name} is defined in the module {module}.",
    "from {module} import {name}",
    "The name {name} belongs to {module}.",
    "import {module}; help({module}.{name})",
    "See {module} for {name}.",
)
SYN_SENTENCES = {
    "city": (
        "{name} was born in {value}.",
        "{name} grew up in the city of {value}.",
        "{name} comes from {value}.",
        "{value} is where {name} was raised.",
    ),
    "job": (
        "{name} works as a {value}.",
        "{name} is a {value} by trade.",
        "{name} earns a living as a {value}.",
        "The {value} in question is {name}.",
    ),
    "animal": (
        "{name} keeps a {value}.",
        "{name} is the owner of a {value}.",
        "{name} lives with a {value}.",
        "The {value} is looked after by {name}.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the bundled model was taught.

    Attributes:
        api: (name, module that defines it), real facts about the standard library.
        syn: (name, attribute, value), made up; attributes are city, job and animal.
    """

    api: tuple[tuple[str, str], ...]
    syn: tuple[tuple[str, str, str], ...]

    @classmethod
    def from_json(cls, text: str) -> "Facts":
        """Reads the table beside the weights."""
        tables = json.loads(text)
        return cls(*(tuple(tuple(row) for row in tables[field]) for field in ("api", "syn")))


def bundled_model() -> Path:
    """Folder of the bundled checkpoint, in Hugging Face layout."""
    return Path(str(resources.files("gradot_jax.demo"))) / "tiny_opt"


def bundled_facts() -> Facts:
    """The facts that the bundled checkpoint was trained on."""
    return Facts.from_json((bundled_model() / "facts.json").read_text())


def stdlib_sources() -> dict[str, str]:
    """Sources of the standard library by dotted module name, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for folder, directories, files in os.walk(root):
        directories[:] = sorted(
            d for d in directories if d not in _PRUNED and not d.startswith("config-")
        )
        for file in sorted(files):
            if not file.endswith(".py"):
                continue
            path = Path(folder) / file
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[module] = path.read_text(encoding="utf-8", errors="replace")
    return dict(sorted(sources.items()))


def prose_documents() -> list[str]:
    """The language reference shipped with Python, one document a topic, in a seeded order."""
    from pydoc_data.topics import topics

    documents = [
        re.sub(r"[ \t]+", " ", re.sub(r"\n{3,}", "\n\n", topics[title])).strip()
        for title in sorted(topics)
    ]
    random.Random(0).shuffle(documents)
    return documents


def fact_pass(facts: Facts, world: str, rng: random.Random) -> Iterator[str]:
    """Every fact of one world (`api` or `syn`) once, in random order and wording."""
    if world == "api":
        for name, module in rng.sample(facts.api, len(facts.api)):
            yield rng.choice(API_SENTENCES).format(name=name, module=module)
    else:
        for name, attribute, value in rng.sample(facts.syn, len(facts.syn)):
            yield rng.choice(SYN_SENTENCES[attribute]).format(name=name, value=value)
