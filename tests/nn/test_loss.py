import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.nn import loss
from gradot_jax.nn.loss import (
    cross_entropy,
    loss_cotangents,
    target_scores,
    token_log_likelihood,
)

B, T, E, V = 2, 5, 3, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 7)).astype(np.float32)
HIDDEN = RNG.normal(size=(B, T, E)).astype(np.float32)
KERNEL = RNG.normal(size=(E, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T))
WEIGHTS = np.array([[1, 1, 0, 1, 0], [0, 1, 2, 0.5, 1]], np.float32)


@pytest.fixture(params=["at once", "in pieces"])
def pieces(request, monkeypatch):
    # Two positions of each sequence at a time, which do not divide its five.
    monkeypatch.setattr(loss, "_MIN_TOKENS_CPU", 1)
    for name in ("MAX_LOGITS", "_MAX_LOGITS_CPU"):
        monkeypatch.setattr(loss, name, 2**25 if request.param == "at once" else 2 * B * V)
    return request.param


def plain(hidden, kernel, targets=TARGETS):
    return -(token_log_likelihood(jnp.dot(hidden, kernel), targets) * WEIGHTS).sum()


def reference():
    """Loss and both gradients, one token at a time, in float64."""
    total, of_hidden, of_kernel = 0.0, np.zeros((B, T, E)), np.zeros((E, V))
    for b, t in np.ndindex(B, T):
        h = HIDDEN[b, t].astype(np.float64)
        p = np.exp(h @ KERNEL)
        p /= p.sum()
        total -= WEIGHTS[b, t] * np.log(p[TARGETS[b, t]])
        slope = WEIGHTS[b, t] * (p - np.eye(V)[TARGETS[b, t]])
        of_hidden[b, t] = KERNEL @ slope
        of_kernel += np.outer(h, slope)
    return total, of_hidden, of_kernel


def test_log_likelihood_equals_the_log_of_the_softmax(assert_close):
    targets = TARGETS[:, :3]
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
    assert_close(token_log_likelihood(LOGITS, targets), expected, "float32")


def test_shifted_and_huge_logits_stay_finite(assert_close):
    targets = TARGETS[:, :3]
    shifted = token_log_likelihood(LOGITS + 64, targets)
    assert_close(shifted, token_log_likelihood(LOGITS, targets), "float32_model")
    assert np.isfinite(token_log_likelihood(LOGITS * 1e30, targets)).all()


def test_half_precision_logits_give_a_float32_loss():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    assert token_log_likelihood(logits, TARGETS[:, :3]).dtype == jnp.float32


@pytest.mark.usefixtures("pieces")
def test_loss_and_gradients_of_a_head_equal_float64_numpy(assert_close):
    total, gradients = jax.value_and_grad(cross_entropy, argnums=(0, 1))(
        HIDDEN, KERNEL, TARGETS, WEIGHTS
    )
    expected, *wanted = reference()
    assert_close((total, *gradients), (expected, *wanted), "float32")
    assert_close(cross_entropy(HIDDEN, KERNEL, TARGETS, WEIGHTS), expected, "float32")


@pytest.mark.usefixtures("pieces")
def test_gradient_of_either_operand_alone_is_scaled_by_the_cotangent(assert_close):
    for argument, wanted in enumerate(reference()[1:]):

        def thrice(x, argument=argument):
            operands = [HIDDEN, KERNEL]
            operands[argument] = x
            return 3 * cross_entropy(*operands, TARGETS, WEIGHTS)

        assert_close(jax.grad(thrice)((HIDDEN, KERNEL)[argument]), 3 * wanted, "float32")


def test_frozen_kernel_has_no_gradient_computed_and_no_logits_kept():
    def count(argument):
        jaxpr = jax.make_jaxpr(jax.grad(cross_entropy, argument))(HIDDEN, KERNEL, TARGETS, WEIGHTS)
        return str(jaxpr).count("dot_general")

    # Logits and one gradient; the kernel's alone takes as many.
    assert count(0) == count(1) == count((0, 1)) - 1 == 2
    _, pull = jax.vjp(lambda h: cross_entropy(h, KERNEL, TARGETS, WEIGHTS), HIDDEN)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= HIDDEN.size + 1


def test_weights_are_not_silently_constant():
    with pytest.raises(TypeError, match="weights"):
        jax.grad(cross_entropy, argnums=3)(HIDDEN, KERNEL, TARGETS, WEIGHTS)


@pytest.mark.usefixtures("pieces")
def test_cotangents_are_those_of_differentiation(assert_close):
    result = loss_cotangents(HIDDEN, KERNEL, TARGETS, WEIGHTS, of_kernel=True)
    total, gradients = jax.value_and_grad(plain, argnums=(0, 1))(HIDDEN, KERNEL)
    assert result.sampled is None
    assert_close((result.loss, result.hidden, result.kernel), (total, *gradients), "float32")


@pytest.mark.usefixtures("pieces")
def test_sampled_targets_follow_the_model_and_leave_the_loss_as_it_was(assert_close):
    keys = jax.random.split(jax.random.key(0), 4096)

    def drawn(key):
        return loss_cotangents(HIDDEN, KERNEL, TARGETS, WEIGHTS, key=key)

    result = jax.jit(jax.vmap(drawn))(keys)
    assert_close(result.loss[0], reference()[0], "float32")
    assert_close(result.hidden[0], reference()[1], "float32")
    p = np.asarray(jax.nn.softmax(HIDDEN.astype(np.float64) @ KERNEL, axis=-1))
    # The gradient of a drawn target has mean zero and the covariance of a column of the kernel.
    mean, second = np.einsum("btv,ev->bte", p, KERNEL), np.einsum("btv,ev->bte", p, KERNEL**2)
    variance = (second - mean**2) * WEIGHTS[..., None] ** 2
    sampled = np.asarray(result.sampled, np.float64)
    assert_close((sampled**2).mean(0), variance, "monte_carlo")
    assert np.abs(sampled.mean(0)).max() < 6e-2 * np.sqrt(variance.max())


def test_half_precision_operands_are_multiplied_into_float32(assert_close):
    half = [jnp.asarray(a, jnp.bfloat16) for a in (HIDDEN, KERNEL)]
    total, gradients = jax.value_and_grad(cross_entropy, argnums=(0, 1))(*half, TARGETS, WEIGHTS)
    assert total.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    exact = plain(*(a.astype(jnp.float32) for a in half))
    assert_close(total, exact, "float32")


def test_logits_of_a_large_vocabulary_are_never_there_at_once():
    shapes = [(2, 512, 8), (8, 50272)]
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    ids, weights = (jax.ShapeDtypeStruct((2, 512), dtype) for dtype in (jnp.int32, jnp.float32))
    compiled = jax.jit(jax.grad(cross_entropy)).lower(hidden, kernel, ids, weights).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < 4 * loss.MAX_LOGITS * 4


def test_pieces_that_do_not_count_are_not_read(pieces, assert_close):
    """A NaN where nothing counts spoils nothing: no logit of it is made."""
    weights = np.zeros((B, T), np.float32)
    weights[0, 3] = weights[1, 4] = 1
    clean = loss_cotangents(HIDDEN, KERNEL, TARGETS, weights, of_kernel=True)
    total, of_hidden = 0.0, np.zeros((B, T, E))
    for b, t in ((0, 3), (1, 4)):
        p = np.exp(HIDDEN[b, t].astype(np.float64) @ KERNEL)
        p /= p.sum()
        total -= np.log(p[TARGETS[b, t]])
        of_hidden[b, t] = KERNEL @ (p - np.eye(V)[TARGETS[b, t]])
    assert_close(clean.loss, total, "float32")
    assert_close(clean.hidden, of_hidden, "float32")
    if pieces == "in pieces":
        spoilt = HIDDEN.copy()
        spoilt[:, :3] = np.nan
        # The first piece holds what counts, and one other position of each row.
        spoilt[:, 0] = HIDDEN[:, 0]
        again = loss_cotangents(spoilt, KERNEL, TARGETS, weights, of_kernel=True)
        assert_close(again.kernel, clean.kernel, "float32")
        assert_close(again.hidden, clean.hidden, "float32")


def test_scores_of_targets_are_those_of_all_logits(pieces, assert_close):
    logits = HIDDEN @ KERNEL
    counted = WEIGHTS > 0
    targets = np.where(RNG.random((B, T)) < 0.5, logits.argmax(-1), TARGETS)
    scores = target_scores(HIDDEN, KERNEL, targets, counted)
    expected = np.where(counted, token_log_likelihood(logits, targets), 0)
    assert_close(scores.log_likelihood, expected, "float32")
    exact = (logits.argmax(-1) == targets) | ~counted
    np.testing.assert_array_equal(scores.exact, exact)
    assert not exact.all()


def test_scores_of_a_diverged_model_are_not_numbers(pieces):
    scores = target_scores(np.full_like(HIDDEN, np.nan), KERNEL, TARGETS, WEIGHTS > 0)
    np.testing.assert_array_equal(np.isnan(scores.log_likelihood), WEIGHTS > 0)
