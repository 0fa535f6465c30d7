"""The downstream tasks, one record each: their data, their metric, how they are tuned on.

Eight question sets and WikiText-2 are those of the offsite-tuning papers. The others are made by
`scripts/real_data.sh` from what packages ship, so that a small model can be measured without a
network; they are known in one wording only.

A task of the papers is read in one of two presets.

`paper` is the text of offsite-tuning's code (arXiv 2302.04870), which its successors share.
Answers follow the prompt without a space in seven of the eight, nothing ends them, blocks are as
long as there; results are measured as lm-eval 0.3.0 does: a space before every answer, no BOS.
PIQA and HellaSwag choose and report on one split, WikiText-2 too.

`corrected` trains on what is measured: lm-eval 0.4's prompt, a space before every answer and
`eos_token_id` after it, and before every prompt what a document begins with. No split both chooses
and reports: PIQA and HellaSwag, whose test answers are secret, choose on the first 5 % of their
training rows.

Two deviations from both. A prompt that is too long loses its beginning, where their code cuts
the answer off and has nothing left to learn. Of the aliases of a WebQs answer all are tried,
where lm-eval leaves out those that begin with another.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from gradot_jax.data import questions
from gradot_jax.data.questions import Part, Preset, Question, Row
from gradot_jax.data.recipe import FineTuning, Validity

Metric = Literal["accuracy", "exact_match", "perplexity"]


class Splits(NamedTuple):
    """Splits of a data set, or slices of them, as `datasets` spells them."""

    train: str
    validation: str
    report: str


PAPERS = FineTuning(
    steps=300, batch_size=32, learning_rate=5e-5, warmup=0, b2=0.999, evaluations=10
)
"""As offsite-tuning trains OPT-1.3B on question sets, but for the number of steps."""
_SHORT = FineTuning(steps=60, batch_size=16, learning_rate=3e-4)
_POINTS = Validity(gain=3, loss=3)
_OWN = Splits("train", "validation", "test")
_HELD_OUT = Splits("train[5%:]", "train[:5%]", "test")
_NO_TEST = Splits("train", "validation", "validation")
_NO_TEST_HELD_OUT = Splits("train[5%:]", "train[:5%]", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskDescription:
    """Where a task's data is, how it is read, and how models are tuned on it.

    Attributes:
        hub_id: name on the Hugging Face hub; None of what `scripts/real_data.sh` makes.
        config: of the data set; None for its only one.
        columns: that are read.
        read: questions, or documents, of the rows of one part.
        paper: splits in that preset; None of a task that the papers have not.
        corrected: splits in that preset.
        metric: that is published.
        space: whether the paper's code puts a space before the answers it trains on.
        ends: whether answers are to be ended by `eos_token_id`; the others say themselves how they
            end.
        paper_length: T of its longest examples; its blocks have one token more.
        corrected_length: T of ours.
        tuning: settings to start from.
        validity: what must happen for a comparison on it to mean something.
    """

    hub_id: str | None = None
    config: str | None = None
    columns: tuple[str, ...]
    read: Callable[[Iterable[Row], Preset, Part], Iterator[Question | str]]
    paper: Splits | None = _OWN
    corrected: Splits = _OWN
    metric: Metric = "accuracy"
    space: bool = False
    ends: bool = True
    paper_length: int = 1023
    corrected_length: int = 1024
    tuning: FineTuning = PAPERS
    validity: Validity = _POINTS


def _arc(config: str) -> TaskDescription:
    return TaskDescription(
        hub_id="allenai/ai2_arc",
        config=config,
        columns=("question", "choices", "answerKey"),
        read=questions.arc,
    )


def _made(metric: Metric) -> TaskDescription:
    return TaskDescription(
        columns=("prompt", "choices", "answer"),
        read=questions.prepared,
        paper=None,
        metric=metric,
        ends=False,
        tuning=_SHORT,
        validity=Validity(gain=10, loss=10),
    )


TASKS: Mapping[str, TaskDescription] = {
    "openbookqa": TaskDescription(
        hub_id="allenai/openbookqa",
        config="main",
        columns=("question_stem", "choices", "answerKey"),
        read=questions.openbookqa,
    ),
    "piqa": TaskDescription(
        hub_id="baber/piqa",
        columns=("goal", "sol1", "sol2", "label"),
        read=questions.piqa,
        paper=_NO_TEST,
        corrected=_NO_TEST_HELD_OUT,
    ),
    "arc-easy": _arc("ARC-Easy"),
    "arc-challenge": _arc("ARC-Challenge"),
    "hellaswag": TaskDescription(
        hub_id="Rowan/hellaswag",
        columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        read=questions.hellaswag,
        paper=_NO_TEST,
        corrected=_NO_TEST_HELD_OUT,
    ),
    "sciq": TaskDescription(
        hub_id="allenai/sciq",
        columns=("support", "question", *questions.SCIQ_CHOICES),
        read=questions.sciq,
    ),
    "webqs": TaskDescription(
        hub_id="stanfordnlp/web_questions",
        columns=("question", "answers"),
        read=questions.webqs,
        paper=_HELD_OUT,
        corrected=_HELD_OUT,
        metric="exact_match",
        space=True,
    ),
    # lm-eval's own copy, EleutherAI/race, has the test split alone.
    "race": TaskDescription(
        hub_id="ehovy/race",
        config="high",
        columns=("article", "question", "options", "answer"),
        read=questions.race,
        paper_length=599,
    ),
    "wikitext-2": TaskDescription(
        hub_id="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        columns=("text",),
        read=questions.wikitext,
        paper=_NO_TEST,
        metric="perplexity",
        paper_length=511,
        corrected_length=512,
        validity=Validity(gain=0.1, loss=0.1),
    ),
    "city": _made("exact_match"),
    "wnkind": _made("accuracy"),
    "social-iqa": _made("accuracy"),
    "colored-objects": _made("accuracy"),
    "gcide": TaskDescription(
        columns=("text",),
        read=questions.documents,
        paper=None,
        metric="perplexity",
        corrected_length=128,
        tuning=_SHORT,
        validity=Validity(gain=0.25, loss=0.8),
    ),
}
"""Every task by name."""
PUBLISHED_TASKS = tuple(name for name, task in TASKS.items() if task.paper)
"""Those of the papers."""
