"""The list of programs against what the pipeline compiles, and against what the package has."""

import gc
import importlib
import logging
import pkgutil
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradot_jax
from gradot_jax.calibration import passes, sweep
from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.evaluation.exact_match import exact_match
from gradot_jax.evaluation.perplexity import perplexity
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.options import CompressionOptions, DistillationOptions, ScaleOTOptions
from gradot_jax.models.families import read_config
from gradot_jax.models.params import init_params, model_shapes
from gradot_jax.models.partition import place_batch, shard_params
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.batch import Batch
from gradot_jax.parallel import make_mesh
from gradot_jax.programs.commands import compression_programs, emulator_shapes
from gradot_jax.programs.compression_run import Run
from gradot_jax.programs.evaluation import decoding_programs, evaluation_programs
from gradot_jax.programs.program import Place, device_bytes, mesh_of
from gradot_jax.programs.training import finetuning_programs
from gradot_jax.training.adapter import finetune_adapter, init_training
from gradot_jax.training.optimizer import make_optimizer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPLIT, ROWS, LENGTH, BATCHES = AdapterSpec(1, 1), 8, 8, 5
METHODS = [
    {"method": "gradot"},
    {"method": "gradot", "channel_score": "gcs-set", "fisher": "mc", "lambda_mlp": 0.1},
    {"method": "gradot+", "budget": 0.7, "allocation": "uniform"},
    {"method": "activation-svd"},
    {"method": "magnitude"},
    {"method": "offsite-tuning", "distillation": DistillationOptions(steps=2, warmup_steps=0)},
    {"method": "scaleot", "scaleot": ScaleOTOptions(steps=2, harmonizer_rank=2)},
    {"method": "crash", "budget": 0.6},
]
NOT_LISTED = {
    "summed_loss": "part of other programs; on its own for users and benchmarks",
    "channel_set_terms": "of a report that no command makes",
    "channel_set_costs": "part of the scores of a layer",
    "_maximum": "one number, on which processes agree",
}


def model_of(family):
    values = (
        LLAMA
        if family == "llama"
        else {
            **{
                k: v
                for k, v in LLAMA.items()
                if k not in ("intermediate_size", "num_key_value_heads")
            },
            "model_type": "opt",
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 2,
        }
    )
    return read_config(values, "test")


def run_of(config, place, **options):
    return Run(
        config=config,
        split=SPLIT,
        options=CompressionOptions(**options),
        place=place,
        stored=jnp.float32,
        dtype=jnp.float32,
        batch_size=ROWS,
        num_batches=BATCHES,
        length=LENGTH,
    )


def text(seed, count=BATCHES):
    rng = np.random.default_rng(seed)
    ones = np.ones((ROWS, LENGTH), np.float32)
    ids = rng.integers(3, 48, (count, ROWS, LENGTH + 1), dtype=np.int32)
    return [Batch(i[:, :-1], i[:, 1:], ones, ones.astype(np.int32)) for i in ids]


class Compiled(logging.Handler):
    """Names of the functions that are compiled, once for each time."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if match := re.match(r"Compiling jit\((\w+)\) with global shapes", record.getMessage()):
            self.found.append(match[1])


@pytest.fixture
def compiled():
    """What JAX compiles while a test runs."""
    handler = Compiled()
    logger = logging.getLogger("jax._src.interpreters.pxla")
    level, logger.propagate = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    jax.clear_caches()
    yield handler.found
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = True


def names_of(programs):
    return {program.function.__name__ for program in programs}


def too_often(compiled, programs):
    """Functions of the package that were compiled more often than there are programs of them."""
    # Names that functions of JAX's own have too.
    names = own_functions().keys() - NOT_LISTED.keys() - {"stack", "unstack"}
    own = Counter(name for name in compiled if name in names)
    listed = Counter(program.function.__name__ for program in programs)
    assert own
    return {name: count for name, count in own.items() if count > listed[name]}


def own_functions():
    """Every jitted function of the package by name."""
    found = {}
    for module in pkgutil.walk_packages(gradot_jax.__path__, "gradot_jax."):
        if "__main__" in module.name:
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ModuleNotFoundError:
            # Needs an extra.
            continue
        for name, value in vars(loaded).items():
            if type(value).__name__ == "PjitFunction":
                found.setdefault(value.__name__, (module.name, name))
    return found


def all_programs(config, place):
    model = model_shapes(config)
    emulator = CompressionOptions()
    spec = emulator.record.forecast(config, SPLIT, emulator)
    programs = [
        p for options in METHODS for p in compression_programs(run_of(config, place, **options))
    ]
    sizes = {"batch_size": ROWS, "length": LENGTH}
    optimizer = make_optimizer(learning_rate=1e-3, num_steps=2)
    from gradot_jax.compression.plan import EmulatorSpec

    shape = EmulatorSpec(
        method="gradot", attention_budget=0.6, mlp_budget=0.6, shapes=spec.shapes, layer_map=(0, 1)
    )
    tuned = emulator_shapes(config, SPLIT, shape, jnp.float32)
    programs += finetuning_programs(
        config, tuned, optimizer, place, **sizes, dtype=jnp.float32, validations=1
    )
    for kind in ("text", "answers"):
        programs += evaluation_programs(config, model, place, **sizes, kind=kind)
    return programs + decoding_programs(config, model, place, batch_size=ROWS, length=4, steps=4)


def test_every_jitted_function_is_in_the_list_or_said_not_to_be():
    listed = names_of(all_programs(model_of("llama"), mesh_of(jax.devices(), 4, 2)))
    # On GPUs and TPUs decompositions are spread, on CPUs not.
    listed |= {"_spread"}
    found = own_functions()
    assert not found.keys() - listed - NOT_LISTED.keys()
    assert not NOT_LISTED.keys() - found.keys()


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("sizes", [(4, 2), (1, 1)], ids=["mesh", "alone"])
def test_every_program_is_lowered_from_shapes_alone(family, sizes):
    place = mesh_of(jax.devices(), *sizes)
    for program in all_programs(model_of(family), place):
        lowered = program.trace().lower(lowering_platforms=("tpu",))
        assert lowered.args_info and program.times >= 1


@pytest.mark.parametrize(
    "options", METHODS, ids=lambda options: "-".join(map(str, options.values()))[:40]
)
def test_a_compression_compiles_the_programs_that_are_listed_and_each_once(options, compiled):
    config = model_of("llama")
    mesh = make_mesh(4, 2)
    params = shard_params(init_params(config, jax.random.key(0)), mesh)
    run = run_of(config, Place(list(mesh.mesh.devices.flat), mesh), **options)
    compiled.clear()
    result = run_compression(config, params, SPLIT, text(0), run.options, mesh=mesh)
    gradient_fidelity(config, params, result.emulator, text(1, 2), mesh=mesh)
    assert not too_often(compiled, compression_programs(run))


WATCHED = {
    "forward_layer": (sweep, "calibration forward, one layer"),
    "head_of_batch": (passes, "head and its cotangents"),
    "sweep_layer": (sweep, "factor sweep, one layer"),
    "input_moments": (sweep, "moments of inputs, one layer"),
}


@pytest.mark.parametrize("options", METHODS[:4], ids=["gradot", "mc", "gradot+", "activation-svd"])
def test_what_lies_on_a_device_is_what_the_list_says(options, monkeypatch):
    # Weights on the host, as of a mapped file: what is on the device is the compression's own.
    config = read_config({**LLAMA, "hidden_size": 64, "num_hidden_layers": 6}, "test")
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    run = run_of(config, Place(jax.devices()[:1]), **options)
    held = dict.fromkeys(WATCHED, 0)

    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)

    def watching(name, honest):
        def watched(*args, **kwargs):
            swept = name != "sweep_layer" or args[2] is not None
            held[name] = max(held[name], live() if swept else 0)
            return honest(*args, **kwargs)

        return watched

    gc.collect()
    # Held, so that no other array gets its id.
    others = jax.live_arrays()
    before = {id(array) for array in others}
    for name, (module, _) in WATCHED.items():
        monkeypatch.setattr(module, name, watching(name, getattr(module, name)))
    run_compression(config, params, SPLIT, text(0), run.options)
    listed = {program.name: program for program in compression_programs(run)}
    compared = 0
    for name, (_, label) in WATCHED.items():
        if held[name] and label in listed:
            program = listed[label]
            said = program.beside_bytes + device_bytes(arrays_of(program))
            # Batches, masks and what Python has not let go of yet are not listed.
            assert 0.85 * held[name] < said < 1.15 * held[name], (label, said, held[name])
            compared += 1
    assert compared >= 2


def arrays_of(program):
    leaves = jax.tree.leaves((program.args, dict(program.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]


def test_a_program_at_two_moments_is_listed_once_with_the_runs_of_both():
    run = run_of(model_of("llama"), Place(jax.devices()[:1]))
    programs = compression_programs(run)
    keys = [program.key for program in programs]
    assert len(set(keys)) == len(keys)
    (embedding,) = (program for program in programs if program.name == "embedding")
    # Each batch of the calibration once, and those held out through two models.
    assert embedding.times == BATCHES + 2 * run.held_out


def test_tuning_and_evaluation_compile_the_programs_that_are_listed(compiled):
    config = model_of("opt")
    mesh = make_mesh(4, 2)
    place = Place(list(mesh.mesh.devices.flat), mesh)
    params = init_params(config, jax.random.key(0))
    options = CompressionOptions(method="magnitude")
    emulator = run_compression(config, params, SPLIT, text(0), options).emulator
    optimizer = make_optimizer(learning_rate=1e-3, num_steps=3)
    compiled.clear()
    finetune_adapter(
        config,
        emulator,
        text(1),
        optimizer,
        num_steps=3,
        validation_batches=text(2, 2),
        evaluate_every=1,
        mesh=mesh,
    )
    model = shard_params(params, mesh)
    batches = [place_batch(batch, mesh) for batch in text(3, 2)]
    perplexity(config, model, batches)
    exact_match(config, model, batches)
    assert not too_often(compiled, all_programs(config, place))


def test_shapes_of_training_are_those_of_what_is_placed():
    config = model_of("llama")
    mesh = make_mesh(4, 2)
    place = Place(list(mesh.mesh.devices.flat), mesh)
    params = init_params(config, jax.random.key(0))
    result = run_compression(config, params, SPLIT, text(0), CompressionOptions(method="magnitude"))
    optimizer = make_optimizer(learning_rate=1e-3, num_steps=3)
    frozen, state = init_training(result.emulator, optimizer, compute_dtype=jnp.bfloat16, mesh=mesh)
    shapes = emulator_shapes(config, SPLIT, result.plan.emulator, jnp.float32)
    step, _ = finetuning_programs(
        config,
        shapes,
        optimizer,
        place,
        batch_size=ROWS,
        length=LENGTH,
        dtype=jnp.bfloat16,
        validations=1,
    )
    _, _, expected_state, expected_frozen, _ = step.args
    for got, expected in ((state, expected_state), (frozen, expected_frozen)):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        for a, b in pairs:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, frozen)))
    assert device_bytes((expected_state, expected_frozen)) == held
