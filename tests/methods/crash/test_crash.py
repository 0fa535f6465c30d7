import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.plan import Plan
from gradot_jax.errors import InputError
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.crash.crash import arrange, compress, pooled_hidden_states
from gradot_jax.methods.options import CompressionOptions, CrashOptions
from gradot_jax.methods.problem import Problem
from gradot_jax.models.params import count_params, get_block, unstack_blocks
from gradot_jax.models.run import apply_layer, embed, forward, head, summed_loss
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.nn.norm import layer_norm
from gradot_jax.offsite.emulator import build_emulator
from gradot_jax.parallel import make_mesh

LAYERS = 8
SPLIT = AdapterSpec(1, 2)
BUDGET = 0.6
"""Three of the five layers between; to rebuild the full depth one of them is of the adapter."""
VARIANTS = [(adapter, share) for adapter in ("sandwich", "own") for share in (True, False)]


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model(num_hidden_layers=LAYERS, ffn_dim=16)


@pytest.fixture(scope="module")
def batches(toy_batch):
    return [toy_batch(0), toy_batch(1)]


def options_of(adapter="sandwich", share=True, budget=BUDGET) -> CompressionOptions:
    return CompressionOptions(
        method="crash", budget=budget, adapter=adapter, crash=CrashOptions(share=share)
    )


@pytest.fixture(scope="module")
def run(model, batches):
    """Compresses by variant, each once."""
    results = {
        variant: run_compression(*model, SPLIT, batches, options_of(*variant))
        for variant in VARIANTS
    }
    return lambda *variant: results[variant]


def original_layers(params):
    return [get_block(params.segments[0], i) for i in range(params.num_layers)]


def problem(model, batches, split=SPLIT, mesh=None, **options) -> Problem:
    config, params = model
    return Problem(
        config=config,
        params=params,
        split=split,
        batches=batches,
        options=options_of(**options),
        mesh=mesh,
    )


def places_by_hand(result, share) -> list[int]:
    """Original layer that runs at each place: the nearest kept one, the right one of two."""
    kept = result.calibration["kept_layers"]
    places = []
    for place in range(LAYERS):
        distances = [abs(layer - place) for layer in kept]
        near = [layer for layer in kept if abs(layer - place) == min(distances)]
        if share or place in kept:
            places.append(near[-1])
    return places


def logits_by_hand(config, params, places, ids) -> np.ndarray:
    blocks = original_layers(params)
    hidden = embed(config, params.shell, ids)
    for place in places:
        hidden = apply_layer(config, blocks[place], hidden)
    return np.asarray(head(config, params.shell, hidden))


@pytest.mark.parametrize(("adapter", "share"), VARIANTS)
def test_emulator_is_the_model_unrolled_by_hand(adapter, share, run, model, batches, assert_close):
    config, params = model
    result = run(adapter, share)
    places = places_by_hand(result, share)
    assert len(places) == (LAYERS if share else SPLIT.num_blocks + 3)
    ids = batches[0].input_ids
    expected = logits_by_hand(config, params, places, ids)
    assert_close(forward(config, result.emulator.assemble(), ids), expected, "float32_model")


@pytest.mark.parametrize(("adapter", "share"), VARIANTS)
def test_stored_blocks_are_the_layers_of_the_plan(adapter, share, run, model):
    result = run(adapter, share)
    original = original_layers(model[1])
    stored = list(result.emulator.stored_layers())
    assert len(stored) == len(result.plan.layers)
    for block, layer in zip(stored, result.plan.layers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, block, original[layer.layer])
    assert Plan.from_json(result.plan.to_json()) == result.plan


@pytest.mark.parametrize(("adapter", "share"), VARIANTS)
def test_shared_blocks_are_stored_once(adapter, share, run, model):
    result = run(adapter, share)
    block = count_params(original_layers(model[1])[0])
    assert count_params(result.emulator.middle) == len(result.plan.layers) * block
    trained = set(result.calibration["adapter_layers"])
    stored = [layer.layer for layer in result.plan.layers]
    frozen = [layer for layer in stored if layer not in trained]
    assert frozen == sorted(set(result.calibration["kept_layers"]) - trained)
    assert (len(stored), len(frozen)) == (3, 2 if share else 3)


@pytest.mark.parametrize(("adapter", "share"), VARIANTS)
def test_copies_of_adapter_blocks_count_as_layers_kept(adapter, share, model, batches):
    for most in range(1, 6):
        chosen = problem(model, batches, adapter=adapter, share=share, budget=most / 5)
        try:
            outcome = compress(chosen)
        except InputError:
            # Each end of the adapter has a copy beside the one layer that is kept.
            assert share and most < 3
            continue
        clusters = len(outcome.calibration["clusters"]) - (
            SPLIT.num_blocks if adapter == "own" else 0
        )
        trained = outcome.split.layers(LAYERS)
        copies = [plan.layer for plan in outcome.layers if plan.layer in trained]
        assert clusters + len(copies) == len(outcome.layers) <= most
        assert share or not copies


def test_a_budget_that_copies_exceed_is_refused_with_the_least(model, batches):
    with pytest.raises(InputError, match=r"at least 3 are stored, a budget of 0\.6"):
        compress(problem(model, batches, budget=0.59))
    with pytest.raises(InputError, match=r"the least is 0\.2"):
        compress(problem(model, batches, share=False, budget=0.19))


@pytest.mark.parametrize("adapter", ["sandwich", "own"])
def test_clusters_cover_what_is_clustered(adapter, run):
    result = run(adapter, True)
    clusters = result.calibration["clusters"]
    layers = [layer for cluster in clusters for layer in cluster]
    assert layers == list(range(1, 6) if adapter == "sandwich" else range(LAYERS))
    assert len(clusters) == (2 if adapter == "sandwich" else 2 + SPLIT.num_blocks)
    borders = {right[0] - 1 for right in clusters[1:]}
    similarity = result.scores["adjacent_similarity"]
    within = set(layers[:-1]) - borders
    assert max(similarity[list(borders)]) <= min(similarity[list(within)])


def test_sandwich_keeps_the_adapter_asked_for(run):
    assert run("sandwich", True).emulator.adapter.split == SPLIT


def test_own_adapter_has_as_many_blocks_spread_over_the_kept_layers(run, model):
    result = run("own", True)
    kept = result.calibration["kept_layers"]
    # Three of five: positions 0, 2 and 4.
    trained = [kept[i] for i in (0, 2, 4)]
    adapter = result.emulator.adapter
    assert list(adapter.split.layers(LAYERS)) == trained
    original = original_layers(model[1])
    blocks = unstack_blocks(adapter.stacks)
    jax.tree.map(np.testing.assert_array_equal, blocks, [original[layer] for layer in trained])


@pytest.mark.parametrize("adapter", ["sandwich", "own"])
def test_adapter_gradient_is_that_of_the_model_unrolled(adapter, run, model, batches, assert_close):
    config, params = model
    result = run(adapter, True)
    trained = result.calibration["adapter_layers"]
    places = places_by_hand(result, share=True)
    batch = batches[0]

    def loss(tuned):
        return summed_loss(config, result.emulator.assemble(tuned), batch)[0]

    def loss_by_hand(tuned):
        original = original_layers(params)
        hidden = embed(config, params.shell, batch.input_ids)
        for place, source in enumerate(places):
            is_trained = place in trained
            block = tuned[trained.index(place)] if is_trained else original[source]
            hidden = apply_layer(config, block, hidden)
        logits = jax.nn.log_softmax(head(config, params.shell, hidden))
        return -jnp.take_along_axis(logits, batch.targets[..., None], axis=-1).sum()

    gradient = jax.jit(jax.grad(loss))(result.emulator.adapter)
    blocks = [original_layers(params)[layer] for layer in trained]
    expected = jax.jit(jax.grad(loss_by_hand))(blocks)

    def flat(tree) -> np.ndarray:
        # One vector: keys' biases have no gradient but rounding.
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])

    got = unstack_blocks(gradient.stacks)
    assert_close(flat(got), flat(expected), "float32_model")
    assert all(np.abs(flat(block)).max() > 0 for block in got)


def test_copies_of_adapter_blocks_stay_as_they_were(run, model, batches, assert_close):
    config, params = model
    emulator = run("sandwich", True).emulator
    tuned = jax.tree.map(lambda leaf: leaf + 0.1, emulator.adapter)
    places = places_by_hand(run("sandwich", True), share=True)
    trained = SPLIT.layers(LAYERS)
    assert any(source in trained and place != source for place, source in enumerate(places))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params.segments[0])
    hidden = embed(config, params.shell, batches[0].input_ids)
    for place, source in enumerate(places):
        stack = moved if place in trained else params.segments[0]
        hidden = apply_layer(config, get_block(stack, source), hidden)
    got = forward(config, emulator.assemble(tuned), batches[0].input_ids)
    assert_close(got, np.asarray(head(config, params.shell, hidden)), "float32_model")


def test_whole_budget_is_the_original(model, batches, assert_close):
    config, params = model
    for adapter in ("sandwich", "own"):
        result = run_compression(*model, SPLIT, batches, options_of(adapter, budget=1.0))
        assert result.calibration["kept_layers"] == list(range(LAYERS))
        ids = batches[0].input_ids
        expected = forward(config, params, ids)
        assert_close(forward(config, result.emulator.assemble(), ids), expected, "float32_model")


def test_published_layers_are_rebuilt_to_full_depth():
    kept = (0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23)
    split = AdapterSpec.of_layers((0, 5, 18, 23), 24)
    assert split == AdapterSpec(1, 1, (5, 18))
    stored, layer_map = arrange(kept, split, 24, share=True)
    # Between 18 and 20 the right one wins, so 18 is copied on its left alone.
    assert stored == [1, 2, 3, 5, 5, 9, 12, 15, 18, 20, 22]
    layers = iter(split.inner)
    runs = [next(layers) if place is None else stored[place] for place in layer_map]
    assert runs == [1, 2, 3, 5, 5, 5, 9, 9, 9, 9, 12, 12, 12, 15, 15, 15, 18, 18, 20, 20, 22, 22]


def test_copies_on_both_sides_of_an_inner_block_reach_the_emulator(model):
    _, params = model
    split = AdapterSpec.of_layers((0, 3, 7), LAYERS)
    stored, layer_map = arrange((0, 3, 6, 7), split, LAYERS, share=True)
    assert stored == [0, 3, 3, 6]
    assert layer_map == (0, 1, None, 2, 3, 3)
    adapter = adapter_of(params, split)
    blocks = [original_layers(params)[layer] for layer in stored]
    emulator = build_emulator(params.shell, adapter, blocks, layer_map)
    assert emulator.layer_map == layer_map
    jax.tree.map(np.testing.assert_array_equal, list(emulator.stored_layers()), blocks)


def test_skipping_runs_the_kept_layers_once():
    split = AdapterSpec.of_layers((0, 5, 18, 23), 24)
    kept = (0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23)
    stored, layer_map = arrange(kept, split, 24, share=False)
    assert stored == [1, 2, 3, 9, 12, 15, 20, 22]
    assert layer_map == (0, 1, 2, None, 3, 4, 5, None, 6, 7)


def test_places_beyond_the_outermost_kept_layers_run_copies_of_those():
    split = AdapterSpec.of_layers((2, 5), 8)
    assert split == AdapterSpec(0, 0, (2, 5))
    stored, layer_map = arrange((2, 4, 5), split, 8, share=True)
    assert stored == [2, 4, 5]
    assert layer_map == (0, 0, None, 1, 1, None, 2, 2)


def test_pooling_weights_tokens_by_position(model, toy_batch, assert_close):
    config, params = model
    mask = np.ones((4, 6), np.float32)
    mask[1, 4:] = mask[2, 1:] = 0
    batch = toy_batch(2, size=4)._replace(attention_mask=jnp.asarray(mask))
    hidden = embed(config, params.shell, batch.input_ids, batch.attention_mask)
    outputs = []
    for block in original_layers(params):
        hidden = apply_layer(config, block, hidden, batch.attention_mask)
        outputs.append(hidden)
    outputs[-1] = layer_norm(params.shell.final_layer_norm, hidden)
    expected = np.zeros((LAYERS, 4, config.hidden_size))
    for layer, output in enumerate(np.asarray(outputs, np.float64)):
        for row, length in enumerate((6, 4, 1, 6)):
            total = sum(range(1, length + 1))
            for position in range(length):
                expected[layer, row] += (position + 1) / total * output[row, position]
    got = pooled_hidden_states(problem(model, [batch]))
    assert_close(got, expected, "float32_model")


def test_model_without_a_final_norm_is_pooled_as_it_is(toy_model, batches):
    model = toy_model(num_hidden_layers=LAYERS, do_layer_norm_before=False, word_embed_proj_dim=6)
    assert model[1].shell.final_layer_norm is None
    assert pooled_hidden_states(problem(model, batches)).shape == (LAYERS, 16, 8)


def test_at_most_512_sequences_are_read(model, toy_batch):
    big = toy_batch(0, size=300)
    pooled = pooled_hidden_states(problem(model, [big, big, big]))
    assert pooled.shape == (LAYERS, 512, 8)
    np.testing.assert_array_equal(pooled[:, 300:], pooled[:, :212])


def test_rows_of_padding_are_left_out(model, toy_batch, assert_close):
    batch = toy_batch(0)
    mask = np.array(batch.attention_mask)
    mask[5:] = 0
    padded = pooled_hidden_states(problem(model, [batch._replace(attention_mask=mask)]))
    assert_close(padded, pooled_hidden_states(problem(model, [batch]))[:, :5], "float32_model")


def test_sharded_equals_single(model, batches, assert_close):
    single = compress(problem(model, batches))
    sharded = compress(problem(model, batches, mesh=make_mesh(data=8)))
    name = "adjacent_similarity"
    assert_close(sharded.scores[name], single.scores[name], "float32_model")
    assert sharded.layer_map == single.layer_map


@pytest.mark.parametrize(
    ("adapter", "share", "stored", "kept"),
    # In a sandwich a copy of the last block is stored too; the own one is a cluster by itself.
    [
        ("sandwich", True, 2, 2),
        ("own", True, 3, 4),
        ("sandwich", False, 1, 2),
        ("own", False, 1, 2),
    ],
)
def test_one_trained_block_is_enough(adapter, share, stored, kept, model, batches):
    options = {"adapter": adapter, "share": share, "budget": stored / 7}
    outcome = compress(problem(model, batches, AdapterSpec(0, 1), **options))
    assert outcome.split.num_blocks == 1
    assert len(outcome.layers) == stored
    assert len(outcome.calibration["kept_layers"]) == kept


@pytest.mark.parametrize("rows", [0, 1])
def test_too_little_text_is_refused(rows, model, toy_batch):
    batch = jax.tree.map(lambda field: field[:rows], toy_batch(0))
    with pytest.raises(InputError, match=r"it needs a batch|at least two sequences"):
        compress(problem(model, [batch] if rows else []))


def test_activations_that_are_not_finite_are_refused(model, batches):
    config, params = model
    blocks = params.segments[0]
    blocks = blocks.replace(fc2=jax.tree.map(lambda leaf: leaf.at[3].mul(np.nan), blocks.fc2))
    with pytest.raises(InputError, match="layers 2 and 3"):
        compress(problem((config, params.replace(segments=(blocks,))), batches))


def test_sandwich_with_inner_blocks_is_refused(model, batches):
    with pytest.raises(InputError, match=r"inner blocks \[4\]"):
        compress(problem(model, batches, AdapterSpec(1, 1, (4,))))
