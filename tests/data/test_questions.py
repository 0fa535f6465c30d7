import pytest

from gradot_jax.data import questions
from gradot_jax.data.questions import Row
from gradot_jax.errors import InputError


def rows(*values):
    return [Row(f"row {i}", value) for i, value in enumerate(values, start=1)]


def arc_row(key, labels):
    texts = [f"text {label}" for label in labels]
    return {"question": "q?", "choices": {"text": texts, "label": list(labels)}, "answerKey": key}


@pytest.mark.parametrize(
    ("key", "labels", "gold"),
    [("A", "ABCD", 0), ("D", "ABCD", 3), ("E", "ABCDE", 4), (" C ", "ABC", 2)]
    + [(str(number), "12345", number - 1) for number in range(1, 6)]
    + [(str(number), "ABCDE", number - 1) for number in range(1, 6)]
    + [("B", "1234", 1)],
)
def test_answer_keys_name_choices_by_letter_or_number(key, labels, gold):
    for preset in ("paper", "corrected"):
        (question,) = questions.arc(rows(arc_row(key, labels)), preset, "train")
        assert question.accepted == (gold,)


@pytest.mark.parametrize("key", ["", "F", "6", "0", "AB", "a"])
def test_an_answer_key_beyond_the_choices_is_refused(key):
    with pytest.raises(InputError, match="row 1: column answerKey must be one of the first 5"):
        list(questions.arc(rows(arc_row(key, "ABCDE")), "paper", "train"))


@pytest.mark.parametrize(
    ("context", "continued", "expected"),
    [
        ("[header] How to sit [title] Find a chair.", "", "Home: How to sit. Find a chair."),
        # Pairs of spaces become one space each, so three become two.
        ("Sit.  [step] Stay.", "[substeps] STAND UP.", "Home: Sit.  Stay. stand up."),
        (" He sits.", "he Stands  up. ", "Home: He sits. He stands up."),
    ],
)
def test_hellaswag_loses_its_marks(context, continued, expected):
    endings = ["[substeps] rises. [title] Go.", " falls\n"]
    row = {"activity_label": "Home", "ctx_a": context, "ctx_b": continued, "endings": endings}
    (question,) = questions.hellaswag(rows(row | {"label": "1"}), "paper", "train")
    assert question == (expected, (" rises.. Go.", "falls"), (1,))


def race_row(article, question, answer):
    options = [f"{article} {letter}" for letter in "abcd"]
    return {"article": article, "question": question, "answer": answer, "options": options}


PASSAGES = rows(
    race_row("One.", "Who?", "A"),
    race_row("Two.", "Where?", "B"),
    race_row("One.", "It was  _  .", "C"),
    race_row("One.", "Why?", "D"),
)


def prompts(preset, part):
    return [question.prompt for question in questions.race(PASSAGES, preset, part)]


def test_race_reports_the_last_question_of_an_article_after_all_others():
    answered = "Article: One.\n\nQuestion: Who?\nAnswer: One. a\n"
    two = "Article: Two.\n\nWhere?"
    assert prompts("corrected", "report") == [f"{answered}It was One. c\nWhy?", two]
    assert prompts("paper", "report") == [f"{answered} _  .One. c\nWhy?", two]
    golds = [question.accepted for question in questions.race(PASSAGES, "paper", "report")]
    assert golds == [(3,), (1,)]


def test_race_trains_on_every_question():
    assert prompts("paper", "train") == [
        f"Article: {article}\n\nQuestion: {question}\n\nAnswer:"
        for article, question in (
            ("One.", "Who?"),
            ("Two.", "Where?"),
            ("One.", "It was  _  ."),
            ("One.", "Why?"),
        )
    ]
    answered = "Article: One.\n\nQuestion: Who?\nAnswer: One. a\n"
    assert prompts("corrected", "train") == [
        "Article: One.\n\nWho?",
        f"{answered}It was  _  .",
        f"{answered}It was One. c\nWhy?",
        "Article: Two.\n\nWhere?",
    ]
