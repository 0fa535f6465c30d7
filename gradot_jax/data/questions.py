r"""The prompts and answers of each downstream task, from the rows of its data set.

Every reader takes the rows of one part and yields questions in their order. Most parts are
worded alike; where they are not, it is by preset (see `gradot_jax.data.tasks`):

- SciQ: the support is kept as it is, stripped, or stripped on the left.
- RACE: the paper's code trains on `Article: ...\n\nQuestion: ...\n\nAnswer:`, one row a
  question; lm-eval asks the last question of an article after all others with their answers.
- WikiText-2: the paper's documents are its lines, ours are its articles.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from gradot_jax.errors import InputError

Preset = Literal["paper", "corrected"]
Part = Literal["train", "validation", "report"]

_BLANK = "  _  ."
"""How a question of RACE ends that is a sentence to complete."""
SCIQ_CHOICES = ("distractor1", "distractor2", "distractor3", "correct_answer")
"""Columns of the answers to a question of SciQ, the right one last."""
_TITLE = re.compile(r" = [^=].* = \n")
"""Line of WikiText that begins an article."""


class Question(NamedTuple):
    """A prompt with candidate answers, none of them begun by a space.

    Attributes:
        prompt: verbatim.
        choices: candidates.
        accepted: indices of the right ones; the first is the one to learn.
    """

    prompt: str
    choices: tuple[str, ...]
    accepted: tuple[int, ...]

    @property
    def accepted_alone(self) -> "Question":
        """The question with none but its right answers."""
        right = tuple(self.choices[index] for index in self.accepted)
        return Question(self.prompt, right, tuple(range(len(right))))


class Row(NamedTuple):
    """One row of a data set; its methods refuse what is not of the expected type.

    Attributes:
        where: names the row in errors.
        values: by column.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A string."""
        value = self.values[column]
        if not isinstance(value, str):
            raise self.refused(column, "a string")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """One or more strings."""
        return self._texts(self.values[column], column)

    def labelled(self, column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Texts and their labels, as many."""
        value = self.values[column]
        if not isinstance(value, Mapping) or not {"text", "label"} <= value.keys():
            raise self.refused(column, "the lists text and label")
        texts, labels = (self._texts(value[key], column) for key in ("text", "label"))
        if len(texts) != len(labels):
            raise self.refused(column, "as many texts as labels")
        return texts, labels

    def index(self, column: str, count: int) -> int:
        """A number from 0 to `count - 1`, or its decimal digits."""
        value = self.values[column]
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(number) is not int or not 0 <= number < count:
            raise self.refused(column, f"a number from 0 to {count - 1}")
        return number

    def letter(self, column: str, count: int) -> int:
        """The index that a letter stands for, or a digit in its place: A or 1 for 0."""
        key = self.text(column).strip()
        for first in ("A", "1"):
            if len(key) == 1 and 0 <= ord(key) - ord(first) < count:
                return ord(key) - ord(first)
        raise self.refused(column, f"one of the first {count} letters, or numbers from 1")

    def refused(self, column: str, expected: str) -> InputError:
        """What to raise for a value."""
        shown = repr(self.values[column])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return InputError(f"{self.where}: column {column} must be {expected}, got {shown}")

    def _texts(self, value: Any, column: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
            raise self.refused(column, "one or more strings")
        return tuple(value)


Reader = Callable[[Iterable[Row], Preset, Part], Iterator[Question]]


def _alike(parse: Callable[[Row], Question]) -> Reader:
    """A reader for rows that are worded alike in every preset and part."""
    return lambda rows, preset, part: map(parse, rows)


def _cue(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _by_key(row: Row, prompt: str) -> Question:
    texts, labels = row.labelled("choices")
    key = row.text("answerKey").strip()
    # Some rows are lettered and some numbered; a key of the other kind still names the place.
    gold = labels.index(key) if key in labels else row.letter("answerKey", len(texts))
    return Question(prompt, texts, (gold,))


def _openbookqa(row: Row) -> Question:
    return _by_key(row, row.text("question_stem"))


def _arc(row: Row) -> Question:
    return _by_key(row, _cue(row.text("question")))


def _piqa(row: Row) -> Question:
    choices = (row.text("sol1"), row.text("sol2"))
    return Question(_cue(row.text("goal")), choices, (row.index("label", 2),))


def _hellaswag(row: Row) -> Question:
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    prompt = _without_marks(f"{row.text('activity_label')}: {context}")
    endings = tuple(map(_without_marks, row.texts("endings")))
    return Question(prompt, endings, (row.index("label", len(endings)),))


def _without_marks(text: str) -> str:
    """Text without the bracketed marks that WikiHow's markup left in it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _webqs(row: Row) -> Question:
    aliases = row.texts("answers")
    return Question(_cue(row.text("question")), aliases, tuple(range(len(aliases))))


def _prepared(row: Row) -> Question:
    choices = row.texts("choices")
    return Question(row.text("prompt"), choices, (row.index("answer", len(choices)),))


def documents(rows: Iterable[Row], preset: Preset, part: Part) -> Iterator[str]:
    """Texts as they are."""
    del preset, part
    return (row.text("text") for row in rows)


openbookqa: Reader = _alike(_openbookqa)
arc: Reader = _alike(_arc)
piqa: Reader = _alike(_piqa)
hellaswag: Reader = _alike(_hellaswag)
webqs: Reader = _alike(_webqs)
prepared: Reader = _alike(_prepared)


def sciq(rows: Iterable[Row], preset: Preset, part: Part) -> Iterator[Question]:
    """Questions of SciQ."""
    for row in rows:
        support, cue = row.text("support"), _cue(row.text("question"))
        if preset == "corrected":
            support = support.lstrip()
        prompt = f"{support}\n{cue}"
        if preset == "paper" and part == "report":
            prompt = prompt.strip()
        choices = tuple(row.text(column) for column in SCIQ_CHOICES)
        yield Question(prompt, choices, (3,))


def race(rows: Iterable[Row], preset: Preset, part: Part) -> Iterator[Question]:
    """Questions of RACE; one an article where they are to be reported on."""
    if preset == "paper" and part != "report":
        for row in rows:
            article, question = row.text("article"), row.text("question")
            yield _race(row, f"Article: {article}\n\nQuestion: {question}\n\nAnswer:")
        return
    articles: dict[str, list[Row]] = {}
    for row in rows:
        articles.setdefault(row.text("article"), []).append(row)
    for article, group in articles.items():
        text = f"Article: {article}\n\n"
        for row in group:
            if part != "report" or row is group[-1]:
                yield _race(row, text + row.text("question"))
            text += _race_answered(row, preset)


def _race(row: Row, prompt: str) -> Question:
    options = row.texts("options")
    return Question(prompt, options, (row.letter("answer", len(options)),))


def _race_answered(row: Row, preset: Preset) -> str:
    question, (_, options, (gold,)) = row.text("question"), _race(row, "")
    if not question.endswith(_BLANK):
        return f"Question: {question}\nAnswer: {options[gold]}\n"
    # lm-eval 0.3.0 kept the blank and dropped the sentence; 0.4 has it the right way round.
    kept = question[-5:] if preset == "paper" else question[:-5]
    return f"{kept}{options[gold]}\n"


def wikitext(rows: Iterable[Row], preset: Preset, part: Part) -> Iterator[str]:
    """Documents of WikiText-2."""
    lines = (row.text("text") for row in rows)
    if preset == "paper":
        yield from lines
        return
    article = ""
    for line in lines:
        if _TITLE.fullmatch(line) and article.strip():
            yield article
            article = ""
        article += line
    if article:
        yield article
