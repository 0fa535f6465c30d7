"""Downstream tasks of the bundled model, each with train, development and test parts.

`top` is reference prose that the model never saw, measured by perplexity. `api` and `syn` ask in
a new form for facts that it learnt, about the standard library and about made-up people, and are
measured by exact match. Parts of a fact task share no name.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Generic, Literal, TypeVar

import jax
import numpy as np

from gradot_jax.data.examples import prompt_examples, take, text_examples, token_stream, windows
from gradot_jax.data.recipe import FineTuning
from gradot_jax.data.records import Prompt, PromptRecords
from gradot_jax.demo.corpus import Facts, fact_pass, prose_documents, stdlib_sources
from gradot_jax.nn.batch import Batch

LENGTH = 128
"""Tokens of a `top` window, and the bundled model's longest sequence."""

TOP_TEST_WINDOWS = 120
API_NAMES = (600, 210, 390)
SYN_PEOPLE = (200, 50, 130)
"""Sizes of train, development and test; a person makes three items."""

API_QUESTION = "Question: Where do I find {name}?\nAnswer:"
SYN_QUESTIONS = {
    "city": "Question: Which town does {name} call home?\nAnswer:",
    "job": "Question: What does {name} do all day?\nAnswer:",
    "animal": "Question: Which creature belongs to {name}?\nAnswer:",
}
CALIBRATION_SHARES = {"code": 0.35, "syn": 0.30, "api": 0.35}
"""Sources of the calibration text, as in the bundled model's pre-training."""

_CALIBRATION_PASSES = 10

Part = TypeVar("Part")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Parts(Generic[Part]):
    """Documents, items or examples of one task.

    Attributes:
        train: to fine-tune on.
        development: to choose settings with.
        test: to report.
    """

    train: Part
    development: Part
    test: Part


@dataclasses.dataclass(frozen=True)
class Task:
    """A task ready to train and evaluate on.

    Attributes:
        name: `top`, `api` or `syn`.
        metric: what to report on its test part.
        parts: examples.
    """

    name: str
    metric: Literal["perplexity", "exact_match"]
    parts: Parts[Batch]


FINE_TUNING = {
    "top": FineTuning(steps=60, batch_size=16, learning_rate=5e-4),
    "api": FineTuning(steps=100, batch_size=32, learning_rate=3e-3),
    "syn": FineTuning(steps=100, batch_size=32, learning_rate=3e-3),
}


def split_prose(documents: list[str]) -> Parts[list[str]]:
    """Reference prose: a quarter test, an eighth development, the rest train."""
    quarter, eighth = len(documents) // 4, len(documents) // 8
    return Parts(
        train=documents[quarter + eighth :],
        development=documents[quarter : quarter + eighth],
        test=documents[:quarter],
    )


def load_tasks(tokenizer, facts: Facts, names: Sequence[str]) -> dict[str, Task]:
    """Tasks by name, as examples of at most `LENGTH` tokens.

    Raises:
        ValueError: for a name that is none of `top`, `api` and `syn`, or when there are too few
            facts for the parts.
    """
    builders = {"top": _top_task, "api": _api_task, "syn": _syn_task}
    unknown = sorted(set(names) - set(builders))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}, expected some of {list(builders)}")
    return {name: builders[name](tokenizer, facts) for name in names}


def _top_task(tokenizer, facts: Facts) -> Task:
    del facts
    documents = split_prose(prose_documents())
    train, development, test = (
        text_examples(tokenizer, part, LENGTH, tokenizer.bos_token_id)
        for part in (documents.train, documents.development, documents.test)
    )
    test = take(test, slice(TOP_TEST_WINDOWS))
    return Task("top", "perplexity", Parts(train, development, test))


def _api_task(tokenizer, facts: Facts) -> Task:
    pairs = [Prompt(API_QUESTION.format(name=name), f" {module}\n") for name, module in facts.api]
    parts = _split([[pair] for pair in pairs], API_NAMES, "api")
    return Task("api", "exact_match", _fact_examples(tokenizer, parts, "api"))


def _syn_task(tokenizer, facts: Facts) -> Task:
    people: dict[str, list[Prompt]] = {}
    for name, attribute, value in facts.syn:
        question = SYN_QUESTIONS[attribute].format(name=name)
        people.setdefault(name, []).append(Prompt(question, f" {value}\n"))
    parts = _split(list(people.values()), SYN_PEOPLE, "syn")
    return Task("syn", "exact_match", _fact_examples(tokenizer, parts, "syn"))


def _split(
    groups: list[list[Item]], sizes: tuple[int, int, int], world: str
) -> Parts[tuple[Item, ...]]:
    """Shuffles groups that belong together, and deals them out to the parts."""
    if len(groups) < sum(sizes):
        raise ValueError(f"{world}: the parts need {sum(sizes)} names, there are {len(groups)}")
    random.Random(0).shuffle(groups)
    dealt, start = [], 0
    for size in sizes:
        dealt.append(tuple(item for group in groups[start : start + size] for item in group))
        start += size
    return Parts(*dealt)


def _fact_examples(tokenizer, parts: Parts[tuple[Prompt, ...]], world: str) -> Parts[Batch]:
    def examples(part: str) -> Batch:
        records = PromptRecords(getattr(parts, part), f"{world} {part}")
        return prompt_examples(tokenizer, records, tokenizer.bos_token_id, LENGTH)[0]

    return Parts(*(examples(field.name) for field in dataclasses.fields(Parts)))


def calibration_examples(
    tokenizer,
    facts: Facts,
    *,
    num_sequences: int = 512,
    length: int = LENGTH,
    seed: int = 0,
    sources: Mapping[str, str] | None = None,
) -> Batch:
    """What the model owner calibrates on: random windows of the kind of text it pre-trained on.

    Args:
        tokenizer: of the bundled model.
        facts: what the model was taught.
        num_sequences: windows; each one's source is drawn by `CALIBRATION_SHARES`.
        length: tokens a window.
        seed: of the draws.
        sources: source code by module name; the running Python's standard library when None.

    Returns:
        Examples `[num_sequences, length]`, the same for the same arguments.

    Raises:
        ValueError: when a source is shorter than one window.
    """
    sources = stdlib_sources() if sources is None else sources
    texts = {"code": [f"# {module}\n{source}" for module, source in sources.items()]}
    for world in ("syn", "api"):
        order = random.Random(seed)
        passes = range(_CALIBRATION_PASSES)
        texts[world] = ["\n".join(fact_pass(facts, world, order)) for _ in passes]
    rng = np.random.default_rng(seed)
    drawn = rng.choice(list(CALIBRATION_SHARES), num_sequences, p=list(CALIBRATION_SHARES.values()))
    parts = []
    for name in CALIBRATION_SHARES:
        stream = token_stream(tokenizer, texts[name], tokenizer.bos_token_id)
        starts = rng.integers(0, len(stream) - length, int((drawn == name).sum()))
        parts.append(windows(stream, starts, length))
    # Shuffled, so that any prefix of the sequences is a draw from the mixture too.
    order = rng.permutation(num_sequences)
    return jax.tree.map(lambda *fields: np.concatenate(fields)[order], *parts)
