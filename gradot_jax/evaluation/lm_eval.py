"""A full model, an emulator or a plugged-in model for the lm-evaluation-harness, without torch.

Needs the extra `gradot_jax[eval]`. Sequences are padded to a few lengths, powers of two, and each
length compiles once.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gradot_jax.data.examples import eval_batches, padded_examples
from gradot_jax.data.tokenizer import encode, tokens_in_front
from gradot_jax.errors import InputError
from gradot_jax.evaluation.generation import DIVERGED, Completion, complete, padded_length
from gradot_jax.evaluation.scores import sequence_scores
from gradot_jax.models.decode import longest_cached
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

_MAX_GEN_TOKS = 256


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
        bos: what a prompt begins with. An empty prompt is `prefix_token_id` in any case.
        batch_size: sequences a batch, rounded up to a multiple of the devices along it.
        max_length: input tokens at most; what the model takes when None.
        mesh: devices to lay weights and batches on.
        end_ids: each of them ends a generated text; the configuration's when None.

    Raises:
        InputError: when `max_length` exceeds the model's, the tokenizer adds anything but one
            token in front, or the model has neither a token that begins a text nor one that ends
            it.
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
        end_ids: tuple[int, ...] | None = None,
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
        self._start = tokens_in_front(tokenizer) if bos == "tokenizer" else []
        self._end_ids = config.end_token_ids if end_ids is None else end_ids
        if config.bos_token_id is None and not self._end_ids:
            raise InputError("the model's configuration has neither bos_token_id nor eos_token_id")

    @property
    def bos_token(self) -> int | None:
        """Id of the token that every prompt begins with; None for none."""
        return self._start[0] if self._start else None

    @property
    def eot_token_id(self) -> int:
        """Ends a generated text, the first of those that do."""
        return self._end_ids[0] if self._end_ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty prompt: what begins a text, or else what ends one."""
        bos = self.config.bos_token_id
        return self._end_ids[0] if bos is None else bos

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
            buckets[min(padded_length(used), self.max_length)].append(index)
        # The longest first: what does not fit into memory fails at once.
        for length, indices in sorted(buckets.items(), reverse=True):
            examples = padded_examples([rows[index] for index in indices], length)
            for start, batch in enumerate(eval_batches(examples, self.batch_size)):
                placed = batch if self.mesh is None else put(batch, self.mesh.batched)
                likelihood, exact, _ = to_host(sequence_scores(self.config, self.params, placed))
                here = indices[start * self.batch_size :][: self.batch_size]
                yield from (
                    (index, (float(likelihood[row]), bool(exact[row])))
                    for row, index in enumerate(here)
                )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy completions, each up to a stop string, the end token or its number of tokens.

        Raises:
            InputError: when a task asks for samples, or for more tokens than the model takes, or
                the model's logits are NaN.
        """
        jobs = [self._completion(*request.args) for request in requests]
        complete(
            self.config,
            self.params,
            jobs,
            batch_size=self.batch_size,
            mesh=self.mesh,
            progress=not disable_tqdm,
        )
        for request, job in zip(requests, jobs, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, job.text)
        return [job.text for job in jobs]

    def _completion(self, prompt: str, settings: dict[str, Any]) -> Completion:
        if settings.get("do_sample") or settings.get("temperature"):
            raise InputError(f"the model generates greedily, but the task asks for {settings}")
        asked, until = settings.get("max_gen_toks"), settings.get("until") or []
        count = self.max_gen_toks if asked is None else asked
        capacity = min(self.max_length, longest_cached(self.config))
        if not 1 <= count < capacity:
            raise InputError(
                f"max_gen_toks must lie in [1, {capacity}), below the sequence length, got {count}"
            )
        context = self.tok_encode(prompt) or [self.prefix_token_id]
        return Completion(
            self._fit(context, capacity - count),
            max_tokens=count,
            until=(until,) if isinstance(until, str) else tuple(until),
            end_ids=self._end_ids,
            detokenize=partial(self.tokenizer.decode, clean_up_tokenization_spaces=False),
        )


def _check_number(log_likelihood: float, text: str) -> None:
    if math.isnan(log_likelihood):
        raise InputError(f"the log-likelihood of {text} is NaN: {DIVERGED}")


def _shown(text: str) -> str:
    return repr(text[:60])
