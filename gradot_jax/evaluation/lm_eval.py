"""A full model, an emulator or a plugged-in model for the lm-evaluation-harness, without torch.

Needs the extra `gradot_jax[eval]`. Sequences are padded to a few lengths, powers of two, and each
length compiles once.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gradot_jax.data.examples import eval_batches, padded_examples
from gradot_jax.data.tokenizer import encode
from gradot_jax.errors import InputError
from gradot_jax.evaluation.greedy import Completion, next_tokens
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.family import ModelConfig
from gradot_jax.models.params import Params
from gradot_jax.models.partition import shard_params
from gradot_jax.parallel import DeviceMesh, put, to_host
from gradot_jax.progress import track

Bos = Literal["tokenizer", "never"]
"""What a prompt begins with: whatever the tokenizer puts in front by itself, or nothing.

OPT's tokenizers put `</s>` in front. The harness's own adapter left it out up to 0.4.9.1 and has
asked the tokenizer since; published offsite-tuning results were measured without it.
"""

_SHORTEST = 32
_MAX_GEN_TOKS = 256
_DIVERGED = "the model's logits are not numbers, it has diverged or overflows this data type"


class _Row(NamedTuple):
    prompt: list[int]
    completion: list[int]


class HarnessModel(TemplateLM):
    """A model as the lm-evaluation-harness asks it: log-likelihoods and greedy completions.

    A prompt that is too long loses its beginning, after the BOS token if it has one; a
    continuation is never cut.

    Example: lm_eval.simple_evaluate(model=HarnessModel(config, params, tokenizer), tasks=["piqa"])

    Args:
        config: the model's configuration.
        params: its weights, an assembled emulator's, or a plugged-in model's.
        tokenizer: see `load_tokenizer`.
        bos: what a prompt begins with. An empty prompt is `bos_token_id` in any case.
        batch_size: sequences a batch, rounded up to a multiple of the devices along it.
        max_length: input tokens at most; what the model takes when None.
        mesh: devices to lay weights and batches on.

    Raises:
        InputError: when `max_length` exceeds the model's, or the tokenizer adds anything but one
            token in front.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer,
        *,
        bos: Bos = "tokenizer",
        batch_size: int = 8,
        max_length: int | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        longest = config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= longest:
            raise InputError(f"max_length must lie in [1, {longest}], got {max_length}")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        devices = 1 if mesh is None else mesh.mesh.shape["data"]
        self.config, self.tokenizer, self.bos, self.mesh = config, tokenizer, bos, mesh
        self.params = params if mesh is None else shard_params(params, mesh)
        self.batch_size = -(-batch_size // devices) * devices
        self.max_length = max_length or longest
        self._start = _tokens_in_front(tokenizer) if bos == "tokenizer" else []

    @property
    def bos_token(self) -> int | None:
        """Id of the token that every prompt begins with; None for none."""
        return self._start[0] if self._start else None

    @property
    def eot_token_id(self) -> int:
        """Ends a generated text."""
        return self.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty prompt."""
        return self.config.bos_token_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated at most, where a task does not say."""
        return min(_MAX_GEN_TOKS, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's request caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids; special tokens are not read out of the text."""
        del kwargs
        start = [] if add_special_tokens is False else self._start
        return [*start, *encode(self.tokenizer, string)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats; every token is predicted once.

        The windows are the harness's: disjoint, of `max_length` tokens, the first begun by
        `prefix_token_id` and the last one given as much context as fits.

        Raises:
            InputError: when one is NaN.
        """
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs += [(None, *make_disjoint_window(window)) for window in windows]
            owners += [owner] * (len(pairs) - len(owners))
        scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            _check_number(total, f"the text {_shown(request.args[0])}")
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each `(key, context ids, continuation ids)`.

        Raises:
            InputError: when a continuation does not fit, or its log-likelihood is NaN: the harness
                would take the first of several answers for the likeliest.
        """
        del kwargs
        rows = [self._row(*request) for request in requests]
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(rows)
        progress = partial(track, description="log-likelihoods", total=len(rows))
        for index, answer in progress(self._scores(rows), enabled=not disable_tqdm):
            answers[index] = answer
            key = requests[index][0]
            if key is not None:
                _check_number(answer[0], f"{_shown(key[1])} after {key[0][-60:]!r}")
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _row(self, key, context: list[int], continuation: list[int]) -> _Row:
        if not 1 <= len(continuation) <= self.max_length:
            text = "a text" if key is None else _shown(key[1])
            raise InputError(
                f"the continuation {text} has {len(continuation)} tokens, expected 1 to the "
                f"sequence length {self.max_length}"
            )
        return _Row(self._fit(context, self.max_length + 1 - len(continuation)), continuation)

    def _fit(self, context: list[int], room: int) -> list[int]:
        """The last tokens of a context, behind its BOS token."""
        if len(context) <= room:
            return context
        start = self._start if context[:1] == self._start else []
        return start + context[len(context) - room + len(start) :]

    def _scores(self, rows: Sequence[_Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        buckets = defaultdict(list)
        for index, row in enumerate(rows):
            used = len(row.prompt) + len(row.completion) - 1
            buckets[self._bucket(used)].append(index)
        # The longest first: what does not fit into memory fails at once.
        for length, indices in sorted(buckets.items(), reverse=True):
            examples = padded_examples([rows[index] for index in indices], length)
            for start, batch in enumerate(eval_batches(examples, self.batch_size)):
                scores = sequence_scores(self.config, self.params, self._put(batch))
                likelihood, exact, _ = to_host(scores)
                here = indices[start * self.batch_size :][: self.batch_size]
                yield from (
                    (index, (float(likelihood[row]), bool(exact[row])))
                    for row, index in enumerate(here)
                )

    def _bucket(self, length: int) -> int:
        """The smallest of the lengths that sequences are padded to which takes `length` tokens."""
        return min(max(_SHORTEST, 1 << (length - 1).bit_length()), self.max_length)

    def _put(self, batch):
        return batch if self.mesh is None else put(batch, self.mesh.batched)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy completions, each up to a stop string, the end token or its number of tokens.

        The whole sequence is read anew for every token: meant for short answers.

        Raises:
            InputError: when a task asks for samples, or for more tokens than the model takes, or
                the model's logits are NaN.
        """
        jobs = [self._completion(*request.args) for request in requests]
        order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].ids))
        starts = range(0, len(order), self.batch_size)
        for start in track(starts, "generation", enabled=not disable_tqdm):
            self._generate([jobs[index] for index in order[start : start + self.batch_size]])
        for request, job in zip(requests, jobs, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, job.text)
        return [job.text for job in jobs]

    def _generate(self, jobs: list[Completion]) -> None:
        while any(not job.done for job in jobs):
            length = self._bucket(max(len(job.ids) for job in jobs if not job.done))
            ids = np.zeros((self.batch_size, length), np.int32)
            counts = np.ones(self.batch_size, np.int32)
            active = [(row, job) for row, job in enumerate(jobs) if not job.done]
            for row, job in active:
                ids[row, : len(job.ids)], counts[row] = job.ids, len(job.ids)
            inputs = self._put((ids, counts))
            tokens = to_host(next_tokens(self.config, self.params, *inputs))
            for row, job in active:
                if tokens[row] < 0:
                    text = self.tokenizer.decode(job.ids)[-60:]
                    raise InputError(f"no token is likeliest after {text!r}: {_DIVERGED}")
                job.append(int(tokens[row]))

    def _completion(self, prompt: str, settings: dict[str, Any]) -> Completion:
        if settings.get("do_sample") or settings.get("temperature"):
            raise InputError(f"the model generates greedily, but the task asks for {settings}")
        asked, until = settings.get("max_gen_toks"), settings.get("until") or []
        count = self.max_gen_toks if asked is None else asked
        if not 1 <= count < self.max_length:
            raise InputError(
                f"max_gen_toks must lie in [1, {self.max_length}), below the sequence length, "
                f"got {count}"
            )
        context = self.tok_encode(prompt) or [self.prefix_token_id]
        return Completion(
            self._fit(context, self.max_length - count),
            max_tokens=count,
            until=(until,) if isinstance(until, str) else tuple(until),
            end_id=self.eot_token_id,
            decode=self.tokenizer.decode,
        )


def _check_number(log_likelihood: float, text: str) -> None:
    if math.isnan(log_likelihood):
        raise InputError(f"the log-likelihood of {text} is NaN: {_DIVERGED}")


def _shown(text: str) -> str:
    return repr(text[:60])


def _tokens_in_front(tokenizer) -> list[int]:
    text = "a"
    plain, whole = encode(tokenizer, text), tokenizer(text).input_ids
    start = whole[: len(whole) - len(plain)]
    if whole != start + plain or len(start) > 1:
        raise InputError(
            f"the tokenizer makes {whole} of {text!r}, expected {plain} with at most one token in "
            "front"
        )
    return start
