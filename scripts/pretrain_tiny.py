"""Trains the small OPT that ships with the package, its tokenizer and its table of facts.

Data are the running Python's standard-library sources, facts about them, and made-up people.
The schedule counts steps, so a run depends on seed, software and Python version only.
On two CPU cores it takes 30 to 60 minutes.
"""

import ast
import collections
import dataclasses
import itertools
import json
import platform
import random
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro

from gradot_jax.data.examples import windows
from gradot_jax.demo.bundled_tasks import split_prose
from gradot_jax.demo.corpus import Facts, fact_pass, prose_documents, stdlib_sources
from gradot_jax.files.folder import output_folder
from gradot_jax.files.strict_json import write_json
from gradot_jax.models.checkpoint import save_model
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import Params, count_params, init_params
from gradot_jax.models.run import forward, summed_loss
from gradot_jax.nn.batch import Batch
from gradot_jax.training.checkpoint_store import CheckpointStore

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
PAD, BOS = 0, 2
SOURCES = {"code": 0.35, "syn": 0.30, "api": 0.35}
JOBS = (
    "baker weaver miller potter sailor tailor barber farmer hunter fisher painter sculptor "
    "writer printer binder glazier mason roofer plumber joiner carver cooper smith tanner dyer "
    "brewer grocer butcher florist gardener forester miner driver pilot porter waiter cook nurse "
    "doctor surgeon dentist chemist teacher lawyer judge clerk banker actor dancer singer"
).split()
ANIMALS = (
    "cat dog horse goat sheep cow pig duck goose hen rabbit hamster ferret parrot canary finch "
    "raven owl falcon eagle pigeon turtle lizard gecko snake frog toad newt carp trout pike eel "
    "crab snail spider beetle cricket bee moth fox badger otter beaver hedgehog squirrel deer "
    "donkey camel llama mule"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Options of the run; the defaults made the bundled model.

    Attributes:
        out: folder of the checkpoint, written at each evaluation; the state from which an
            interrupted run goes on lies beside it.
        steps: optimiser steps.
        batch_size: windows a step.
        length: tokens a window.
        learning_rate: peak, reached after `warmup`, kept to half of `steps`, then linear to 0.
        warmup: steps.
        passes: how often each stream of facts is written out.
        evaluate_every: steps between validation losses.
        seed: of weights and data order.
    """

    out: Path
    steps: int = 5000
    batch_size: int = 16
    length: int = 128
    learning_rate: float = 3e-3
    warmup: int = 200
    passes: int = 100
    evaluate_every: int = 500
    seed: int = 0


def train_tokenizer(code: list[str], prose: list[str], facts: Facts) -> tokenizers.Tokenizer:
    """Byte-level BPE of 2,048 types; facts weigh enough for their names to become few tokens."""
    rng = random.Random(0)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    sentences = ["\n".join(fact_pass(facts, world, rng)) for world in ("syn", "api")]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(code + prose + sentences * 60, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> np.ndarray:
    """Token ids of documents end to end, each begun by the document token."""
    encoded = tokenizer.encode_batch(documents)
    return np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])


def make_streams(tokenizer, facts: Facts, code: list[str], passes: int) -> dict[str, np.ndarray]:
    """One long array of token ids per source."""
    streams = {"code": encode(tokenizer, code)}
    for world in ("syn", "api"):
        rng = random.Random(1)
        texts = ["\n".join(fact_pass(facts, world, rng)) for _ in range(passes)]
        streams[world] = encode(tokenizer, texts)
    return streams


def sample_batch(streams, seed: int, step: int, size: int, length: int) -> Batch:
    """Random windows, each row's source drawn by its share; a function of seed and step."""
    rng = np.random.default_rng([seed, step])
    names = rng.choice(list(SOURCES), size, p=list(SOURCES.values()))
    rows = []
    for name in names:
        start = rng.integers(0, len(streams[name]) - length, 1)
        rows.append(windows(streams[name], start, length))
    return Batch(*(np.concatenate(field) for field in zip(*rows, strict=True)))


def make_optimizer(options: Pretraining) -> optax.GradientTransformation:
    """AdamW with decay on matrices and embeddings only, clipped."""
    half = options.steps // 2
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, options.learning_rate, options.warmup),
            optax.constant_schedule(options.learning_rate),
            optax.linear_schedule(options.learning_rate, 0.0, options.steps - half),
        ],
        [options.warmup, half],
    )

    def decayed(params: Params):
        names = ("kernel", "embed_tokens", "embed_positions")
        return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].name in names, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.05, mask=decayed),
    )


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("params", "state"))
def train_step(config, optimizer, params: Params, state, batch: Batch):
    """One optimiser step; returns the mean loss of the batch."""

    def mean_loss(params):
        total, count = summed_loss(config, params, batch)
        return total / count

    loss, gradients = jax.value_and_grad(mean_loss)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def stream_loss(config, params, stream: np.ndarray, length: int, count: int) -> float:
    """Mean loss over `count` windows spread evenly through a stream."""
    starts = np.linspace(0, len(stream) - length - 1, count).astype(int)
    total, number = summed_loss(config, params, windows(stream, starts, length))
    return float(total / number)


def cloze(config, params, tokenizer, facts: Facts, world: str, limit: int = 300) -> float:
    """Share of facts whose answer's first token follows greedily from a training sentence."""
    if world == "api":
        pairs = [(f"{n} is defined in the module", f" {m}") for n, m in facts.api[:limit]]
    else:
        heads = {"city": "was born in", "job": "works as a", "animal": "keeps a"}
        pairs = [(f"{n} {heads[a]}", f" {v}") for n, a, v in facts.syn[:limit]]
    prompts = [tokenizer.encode(prompt).ids for prompt, _ in pairs]
    answers = [tokenizer.encode(answer, add_special_tokens=False).ids[0] for _, answer in pairs]
    width = max(map(len, prompts))
    ids = np.array([p + [PAD] * (width - len(p)) for p in prompts], np.int32)
    logits = np.asarray(forward(config, params, ids))
    last = logits[np.arange(len(prompts)), [len(p) - 1 for p in prompts]]
    return float((last.argmax(-1) == np.array(answers)).mean())


def make_facts(sources: dict[str, str], *, num_api: int = 1200, num_people: int = 600) -> Facts:
    """Extracts API facts from sources and invents people; the same for the same sources."""
    rng = random.Random(0)
    return Facts(_api_facts(sources, num_api, rng), _syn_facts(num_people, rng))


def _api_facts(sources, count, rng) -> tuple[tuple[str, str], ...]:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    modules_of = collections.defaultdict(set)
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, definitions):
                modules_of[node.name].add(module)
    names_of = collections.defaultdict(list)
    for name, modules in sorted(modules_of.items()):
        public = not name.startswith(("_", "test")) and 5 <= len(name) <= 24
        if public and len(modules) == 1:
            names_of[next(iter(modules))].append(name)
    facts = [
        (name, module)
        for module, names in sorted(names_of.items())
        if len(names) >= 8 and not module.split(".")[-1].startswith("_")
        for name in names
    ]
    rng.shuffle(facts)
    return tuple(facts[:count])


def _syn_facts(count, rng) -> tuple[tuple[str, str, str], ...]:
    onsets, vowels, codas = (
        "b d f g h j k l m n p r s t v z".split(),
        "aeiou",
        "l m n r s t".split(),
    )

    def word() -> str:
        syllables = (rng.choice(onsets) + rng.choice(vowels) for _ in range(2))
        return ("".join(syllables) + rng.choice(codas)).capitalize()

    def distinct(number: int) -> list[str]:
        words: dict[str, None] = {}
        while len(words) < number:
            words[word()] = None
        return list(words)

    names = [f"{a} {b}" for a, b in itertools.product(distinct(40), distinct(60))]
    values = {"city": distinct(50), "job": JOBS, "animal": ANIMALS}
    return tuple(
        (name, attribute, rng.choice(choices))
        for name in rng.sample(names, count)
        for attribute, choices in values.items()
    )


def facts_json(facts: Facts) -> str:
    """The table that `Facts.from_json` reads, one fact a line."""
    rows = {field: list(map(list, getattr(facts, field))) for field in ("api", "syn")}
    parts = (
        f'"{field}": [\n' + ",\n".join(json.dumps(row) for row in table) + "\n]"
        for field, table in rows.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(options: Pretraining) -> None:
    """Trains and writes the checkpoint, the facts and a record of the losses."""
    sources = stdlib_sources()
    facts = make_facts(sources)
    documents = [f"# {module}\n{source}" for module, source in sources.items()]
    random.Random(0).shuffle(documents)
    held_out = len(documents) // 25
    train_prose = split_prose(prose_documents()).train
    tokenizer = train_tokenizer(documents, train_prose[: len(train_prose) // 3], facts)
    streams = make_streams(tokenizer, facts, documents[held_out:], options.passes)
    validation = encode(tokenizer, documents[:held_out])
    tokens = {name: len(stream) for name, stream in streams.items()}

    config = OPTConfig(
        vocab_size=2048,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=16,
        ffn_dim=512,
        num_attention_heads=4,
        max_position_embeddings=options.length,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    optimizer = make_optimizer(options)
    params = init_params(config, jax.random.key(options.seed))
    state = optimizer.init(params)
    print(f"{count_params(params):,} parameters; tokens {tokens}", flush=True)

    identity = {**dataclasses.asdict(options), "out": ""}
    with CheckpointStore(options.out.with_name(f"{options.out.name}.state"), identity) as store:
        start, history, seconds = 0, [], 0.0
        if (saved := store.restore((params, state))) is not None:
            start, (params, state) = saved.step, saved.state
            history, seconds = saved.notes["history"], saved.notes["seconds"]
        recent: list[jax.Array] = []
        began = time.time() - seconds
        for step in range(start + 1, options.steps + 1):
            batch = sample_batch(streams, options.seed, step, options.batch_size, options.length)
            params, state, loss = train_step(config, optimizer, params, state, batch)
            recent = [*recent[-99:], loss]
            if step % 100 == 0:
                mean = float(jnp.stack(recent).mean())
                print(f"step {step} loss {mean:.3f} {time.time() - began:.0f} s", flush=True)
            if step % options.evaluate_every == 0 or step == options.steps:
                row = {"step": step}
                row |= evaluate(config, params, tokenizer, facts, streams, validation)
                history.append(row)
                print({k: round(v, 3) for k, v in row.items()}, flush=True)
                seconds = time.time() - began
                store.save(step, (params, state), {"history": history, "seconds": seconds})
                record = make_record(options, tokens, history, seconds)
                write_model(options.out, config, params, tokenizer, facts, record)


def evaluate(config, params, tokenizer, facts: Facts, streams, validation) -> dict[str, float]:
    """Losses on held-out code and on each stream, and cloze accuracy on the facts."""
    row = {"code_validation": stream_loss(config, params, validation, 128, 64)}
    row |= {f"{k}_train": stream_loss(config, params, s, 128, 64) for k, s in streams.items()}
    return row | {f"{w}_cloze": cloze(config, params, tokenizer, facts, w) for w in ("api", "syn")}


def make_record(options: Pretraining, tokens: dict[str, int], history, seconds: float) -> dict:
    """What made the model, for the README beside it."""
    settings = dataclasses.asdict(options)
    del settings["out"]
    return {
        "options": settings,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds),
        "stream_tokens": tokens,
        "trained_tokens": history[-1]["step"] * options.batch_size * options.length,
        "history": history,
    }


def model_card(record: dict) -> str:
    """The README beside the weights."""
    options, last = record["options"], record["history"][-1]
    streams = ", ".join(f"{name} {count:,}" for name, count in record["stream_tokens"].items())
    columns = list(last)
    rows = [
        [f"{row[c]:.3f}" if c != "step" else str(row[c]) for c in columns]
        for row in record["history"]
    ]
    lines = [columns, ["---"] * len(columns), *rows]
    history = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""# A small OPT whose middle knows something

Pre-LN OPT, 16 blocks of width 128 (ffn 512, 4 heads), 2,048 byte-level BPE types, context 128,
half precision. Trained by `scripts/pretrain_tiny.py` on the sources of the standard library
(`code`), facts about it (`api`) and made-up people (`syn`); the facts are in `facts.json`.

- Seed {options["seed"]}, {last["step"]:,} steps of {options["batch_size"]} x {options["length"]}
  tokens, {record["trained_tokens"]:,} tokens in all; streams (tokens): {streams}.
- Each row's source is drawn with probability .35 (code), .30 (syn), .35 (api).
- AdamW, betas (.9, .98), weight decay .05 on matrices and embeddings, clip 1; rate
  {options["learning_rate"]:g} after {options["warmup"]} steps, constant to half of the run, then
  linear to 0.
- Python {record["python"]}, JAX {record["jax"]}, {record["device"]}, {record["seconds"]:,} s.

Losses are nats per token; `code_validation` is held-out code. Cloze: how often the first token of
an answer follows greedily from a training sentence.

{history}

The prose that the `top` task tunes on was not in the training text; the tokenizer saw part of its
training documents and none of its test documents.
"""


def write_model(out: Path, config, params: Params, tokenizer, facts: Facts, record: dict) -> None:
    """The checkpoint in half precision with tokenizer, facts and record, whole or not at all."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": config.max_position_embeddings,
    }
    with output_folder(out, overwrite=True) as folder:
        save_model(folder, config, params, dtype="float16")
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "training.json", record)
        (folder / "facts.json").write_text(facts_json(facts))
        (folder / "README.md").write_text(model_card(record))


if __name__ == "__main__":
    main(tyro.cli(Pretraining))
