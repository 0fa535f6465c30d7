"""The claim of the method, on the trained model that ships with the package."""

import json

import jax
import numpy as np
import pytest

from gradot_jax.calibration.fidelity import gradient_fidelity
from gradot_jax.data.examples import eval_batches, take, text_examples
from gradot_jax.data.tokenizer import load_tokenizer
from gradot_jax.demo.bundled_tasks import calibration_examples, split_prose
from gradot_jax.demo.corpus import bundled_facts, bundled_model, prose_documents, stdlib_sources
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.checkpoint import load_model
from gradot_jax.models.params import concatenate_blocks, count_params, layers_at, stack_blocks
from gradot_jax.models.split import AdapterSpec
from gradot_jax.nn.linear import dense_kernel

SPLIT = AdapterSpec(2, 2)


@pytest.fixture(scope="module")
def model():
    return load_model(bundled_model())


@pytest.fixture(scope="module")
def emulators(model):
    config, params = model
    tokenizer = load_tokenizer(bundled_model())
    some = dict(list(stdlib_sources().items())[:40])
    examples = calibration_examples(tokenizer, bundled_facts(), num_sequences=16, sources=some)
    batches = list(eval_batches(examples, 16))
    return {
        method: run_compression(
            config, params, SPLIT, batches, CompressionOptions(method=method, budget=0.3)
        ).emulator
        for method in ("gradot", "magnitude")
    }


def middle_of(params):
    return stack_blocks(layers_at(params.segments, SPLIT.middle_layers(params.num_layers)))


def attention_error(params, emulator):
    middle, reduced = middle_of(params), concatenate_blocks(emulator.middle)
    errors = [
        np.square(dense_kernel(getattr(reduced, site)) - getattr(middle, site).kernel).sum()
        for site in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    return float(np.sum(errors))


def test_lower_gradient_error_than_magnitude_at_equal_size_and_higher_weight_error(
    model, emulators
):
    config, params = model
    documents = split_prose(prose_documents()).development
    tokenizer = load_tokenizer(bundled_model())
    held_out = text_examples(tokenizer, documents, 128, config.bos_token_id)
    batches = list(eval_batches(take(held_out, slice(16)), 16))
    gradot, magnitude = (
        gradient_fidelity(config, params, emulators[name], batches).adapter
        for name in ("gradot", "magnitude")
    )
    assert count_params(emulators["gradot"]) == count_params(emulators["magnitude"])
    assert gradot.relative_error < 0.9 * magnitude.relative_error
    assert attention_error(params, emulators["gradot"]) > attention_error(
        params, emulators["magnitude"]
    )


def test_emulator_holds_no_array_of_the_original_middle(model, emulators):
    originals = {
        np.asarray(matrix).tobytes()
        for leaf in jax.tree.leaves(middle_of(model[1]))
        if leaf.ndim == 3
        for matrix in leaf
    }
    shipped = [leaf for leaf in jax.tree.leaves(emulators["gradot"].middle) if leaf.ndim == 3]
    assert not originals & {np.asarray(matrix).tobytes() for leaf in shipped for matrix in leaf}


def test_bundled_files_are_small_and_their_record_matches():
    folder = bundled_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    record = json.loads((folder / "training.json").read_text())
    last = record["history"][-1]
    assert last["step"] == record["options"]["steps"]
    assert last["api_cloze"] > 0.9 and last["syn_cloze"] > 0.9
