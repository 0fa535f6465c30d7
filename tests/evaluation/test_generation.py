import jax
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.evaluation.generation import Completion, complete
from gradot_jax.models.decode import Sampling, longest_cached

LETTERS = dict(enumerate("abcdefgh"))


def decode(ids):
    return "".join(LETTERS[token] for token in ids)


def completed(tokens, **settings):
    defaults = {"max_tokens": 9, "until": (), "end_ids": (7,)}
    completion = Completion([0, 1], detokenize=decode, **(defaults | settings))
    for token in tokens:
        assert not completion.done
        completion.append(token)
    return completion


@pytest.mark.parametrize(
    ("tokens", "settings", "text"),
    [
        ([2, 3, 7], {}, "cd"),
        ([2, 3, 4], {"max_tokens": 3}, "cde"),
        ([2, 3, 4], {"until": ("de", "")}, "c"),
        ([2, 3, 4], {"until": ("e", "cde")}, ""),
        ([0, 1, 3], {"until": ("d",)}, "ab"),
    ],
)
def test_a_completion_ends_at_its_first_stop(tokens, settings, text):
    completion = completed(tokens, **settings)
    assert completion.done and completion.text == text


def test_the_prompt_is_no_stop_string():
    completion = completed([2, 3], until=("ab",))
    assert not completion.done and completion.ids == [0, 1, 2, 3]


@pytest.mark.parametrize("end", [(), (7,), (6, 7)])
def test_any_of_the_end_tokens_ends_a_completion(end):
    completion = Completion([0], max_tokens=2, end_ids=end, detokenize=decode)
    completion.append(6)
    assert completion.done == (6 in end)


def jobs_of(prompts, max_tokens, **settings):
    defaults = {"end_ids": (), "detokenize": lambda ids: " ".join(map(str, ids))}
    return [Completion(p, max_tokens=max_tokens, **(defaults | settings)) for p in prompts]


def prompts(config, lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(4, config.vocab_size, n).tolist() for n in lengths]


def test_completions_are_those_of_reading_everything_anew(config, params, log_probabilities):
    jobs = jobs_of(prompts(config, (1, 5, 9, 3, 7)), 8)
    expected = [list(job.ids) for job in jobs]
    for ids in expected:
        for _ in range(8):
            ids.append(int(log_probabilities(np.asarray([ids]), None)[0, -1].argmax()))
    complete(config, params, jobs, batch_size=2)
    assert [job.ids for job in jobs] == expected and all(job.done for job in jobs)


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_batch(config, params):
    def drawn(batch_size, seed):
        jobs = jobs_of(prompts(config, (4, 4, 6)), 10)
        sampling = Sampling(temperature=1.5, top_p=0.9)
        complete(config, params, jobs, batch_size=batch_size, sampling=sampling, seed=seed)
        return [job.ids for job in jobs]

    assert drawn(1, 0) == drawn(3, 0) == drawn(2, 0)
    assert drawn(3, 0) != drawn(3, 1)


def test_logits_that_are_no_numbers_are_an_error(config, params):
    lost = jax.tree.map(lambda leaf: leaf * np.float32("nan"), params)
    with pytest.raises(InputError, match="logits are not numbers"):
        complete(config, lost, jobs_of([[4, 5]], 3), batch_size=1)


def test_nothing_is_written_where_nothing_may_be(config, params):
    jobs = jobs_of([[4, 5]], 0)
    complete(config, params, jobs, batch_size=1)
    assert jobs[0].done and jobs[0].ids == [4, 5] and not jobs[0].text


def test_a_prompt_without_tokens_is_refused(config, params):
    with pytest.raises(InputError, match="a prompt without tokens"):
        complete(config, params, jobs_of([[4], []], 3), batch_size=2)


def test_what_does_not_fit_the_model_is_refused(config, params):
    longest = longest_cached(config)
    with pytest.raises(InputError, match=f"up to {longest + 1} tokens, expected at most"):
        complete(config, params, jobs_of([[4] * longest], 1), batch_size=1)
