"""`gradot generate`: completions of prompts."""

import dataclasses
from functools import partial

from gradot_jax.cli.common import OnModel, data_axis, say
from gradot_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(OnModel):
    """Completes prompts with a model, a bundle's emulator, or the emulator with a tuned adapter.

    A completion ends before any of the model's end tokens, or at its number of tokens. Several
    prompts are written side by side; each is printed with its completion.

    Example: gradot generate --model opt-1.3b-tuned --prompt "Paris is the capital of" "2 + 2 ="

    Attributes:
        prompt: one or more.
        max_tokens: of each completion.
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
        top_p: draw from the fewest of the likeliest tokens whose probabilities reach this.
        seed: of what is drawn.
        batch_size: prompts that are completed side by side.
    """

    MEMORY = ("batch_size", "max_tokens", "dtype", "mesh")

    prompt: tuple[str, ...]
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8

    def run(self) -> None:
        """Executes the command."""
        self._check()
        from gradot_jax.data.tokenizer import document_start, encode
        from gradot_jax.evaluation.generation import Completion, complete
        from gradot_jax.models.decode import Sampling
        from gradot_jax.offsite.describe import printable

        mesh = self.device_mesh()
        config, params, tokenizer, end_ids = self.load(mesh)
        start = document_start(tokenizer, config)
        jobs = [
            Completion(
                [*([] if start is None else [start]), *encode(tokenizer, prompt)],
                max_tokens=self.max_tokens,
                end_ids=end_ids,
                detokenize=partial(tokenizer.decode, clean_up_tokenization_spaces=False),
            )
            for prompt in self.prompt
        ]
        rows = min(self.batch_size, len(jobs))
        complete(
            config,
            params,
            jobs,
            batch_size=-(-rows // data_axis(mesh)) * data_axis(mesh),
            sampling=Sampling(self.temperature, self.top_p),
            seed=self.seed,
            mesh=mesh,
        )
        for prompt, job in zip(self.prompt, jobs, strict=True):
            # What a model writes may hold the codes of a terminal.
            say("", *map(printable, (prompt + job.text).splitlines()))

    def _check(self) -> None:
        self.check_model()
        if not self.prompt:
            raise InputError("--prompt: expected at least one")
        if self.max_tokens < 1 or self.batch_size < 1:
            raise InputError("max_tokens and batch_size must be at least 1")
        if self.top_p < 1 and not self.temperature:
            raise InputError("--top-p goes with a --temperature above 0; without, nothing is drawn")
