"""How many to pass, request by request: each policy against an exhaustive search, or a bound."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kd_ranker.config import keys
from kd_ranker.evaluation import funnel, policy
from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.policy import POLICIES, Curves


def drawn(requests: int, seed: int, known: float = 1, candidates: int = 200) -> Curves:
    """Requests of different difficulty, which the student's scores show as far as `known` is 1.

    The student's error is the same everywhere. Where values differ much, it matters less.
    """
    generator = np.random.default_rng(seed)
    spread = generator.uniform(0.3, 4, (requests, 1))
    truth = generator.normal(size=(requests, candidates)) * spread
    noisy = truth + generator.normal(size=truth.shape)
    order = np.argsort(-noisy, axis=1)
    value = np.take_along_axis(1 / (1 + np.exp(4 - truth)), order, axis=1)
    ks = np.unique(np.geomspace(1, candidates, 40).round().astype(int))
    captured = [np.sort(value[:, :k], axis=1)[:, ::-1][:, :5].sum(axis=1) for k in ks]
    predicted = np.take_along_axis(1 / (1 + np.exp(4 - noisy)), order, axis=1)
    # Ranks alone say nothing of a request.
    blind = np.tile(np.linspace(1, 0.01, candidates), (requests, 1))
    score = (known * predicted + (1 - known) * blind)[:, ks - 1]
    return Curves(ks, score, np.stack(captured, axis=1), np.tile(1.0 * ks, (requests, 1)))


def passed_by(curves, choice):
    return curves.scored[np.arange(len(choice)), choice]


@pytest.mark.parametrize("target", [0.9, 0.99])
def test_uniform_and_threshold_are_the_extreme_ones_that_keep_the_target(target):
    curves = drawn(30, 1)
    of_rows = range(len(curves.score))
    share = curves.captured.sum(axis=0) / curves.captured[:, -1].sum()
    smallest = next(k for k, kept in zip(curves.ks, share, strict=True) if kept >= target)
    assert {*curves.ks[policy.fit("uniform", curves, target).choose(curves.score)]} == {smallest}

    def places(threshold):
        return [max(int((row >= threshold).sum()), 1) - 1 for row in curves.score]

    largest = max(
        of for of in np.unique(curves.score)
        if curves.captured[of_rows, places(of)].sum() / curves.captured[:, -1].sum() >= target
    )  # fmt: skip
    choice = policy.fit("threshold", curves, target).choose(curves.score)
    assert choice.tolist() == places(largest)


def test_hindsight_is_no_worse_than_any_choice_that_keeps_as_much():
    curves = drawn(4, 2, candidates=12)
    choice = policy.hindsight(curves, 0.95)
    kept, passed = curves.kept(choice), passed_by(curves, choice).sum()
    assert kept >= 0.95
    for other in itertools.product(range(len(curves.ks)), repeat=4):
        if curves.kept(np.array(other)) >= kept - 1e-12:
            assert passed_by(curves, np.array(other)).sum() >= passed


@pytest.mark.parametrize("known", [1, 0])
def test_learned_saves_only_where_scores_tell_how_hard_a_request_is(known):
    fitted, tested = drawn(800, 3, known), drawn(800, 4, known)
    choices = {name: policy.fit(name, fitted).choose(tested.score) for name in POLICIES}
    passed = {name: passed_by(tested, choice).mean() for name, choice in choices.items()}
    assert tested.kept(choices["learned"]) == pytest.approx(TARGET, abs=0.004)
    if known:
        assert passed["learned"] < 0.9 * passed["uniform"]
        assert passed["learned"] > passed_by(tested, policy.hindsight(tested, TARGET)).mean()
    else:
        assert len({*choices["learned"]}) == 1
        assert abs(choices["learned"][0] - choices["uniform"][0]) <= 2


@pytest.mark.parametrize("name", POLICIES)
def test_requests_with_fewer_candidates_and_one_request(name):
    curves = drawn(40, 7)
    few = np.where(np.arange(40) % 2, 200, 9)
    last = (curves.ks <= few[:, None]).sum(axis=1) - 1
    score = np.maximum(curves.score, curves.score[range(40), last][:, None])
    some = curves._replace(score=score, scored=np.minimum(curves.scored, few[:, None]))
    choice = policy.fit(name, some, 0.9).choose(score)
    assert some.kept(choice) >= 0.85
    assert passed_by(some, policy.hindsight(some, 0.9))[::2].max() <= 9
    # The same requests give the same policy.
    assert choice.tolist() == policy.fit(name, some, 0.9).choose(score).tolist()
    one = drawn(1, 8)
    assert policy.fit(name, one).choose(one.score).shape == (1,)


@pytest.mark.parametrize("factor", [1.0, np.nan, 0.0])
def test_sums_are_the_curves_at_the_chosen_k_and_unknown_without_value(factor):
    curves = drawn(20, 10)
    captured = factor * curves.captured
    sums = {"score": curves.score, "scored": curves.scored, "value_captured": captured}
    sums |= {"true_value_captured": 2 * captured, "covered_user_value": 3 * captured}
    known = policy.curves_of(sums, curves.ks)
    fitted = {"uniform": policy.fit("uniform", curves)} if known.have_value else {}
    found = policy.sums(fitted, sums, curves.ks, ("uniform",))
    if factor != 1:
        assert np.isnan(np.stack([*found.values()])).all()
        return
    place = policy.fit("uniform", curves).numbers["place"]
    np.testing.assert_allclose(found["policy_scored/uniform"], curves.ks[place])
    for curve, times in (("value", 1), ("true_value", 2)):
        of_policy = found[f"policy_{curve}_captured/uniform"]
        np.testing.assert_allclose(of_policy, times * captured[:, place])
    assert found["policy_scored/hindsight"].sum() <= found["policy_scored/uniform"].sum()


@pytest.mark.parametrize("name", POLICIES)
def test_a_stored_and_exported_policy_chooses_the_measured_k(name):
    curves = drawn(300, 11)
    fitted = policy.fit(name, curves, 0.95)
    stored = policy.from_json(policy.to_json({("a", "user"): {name: fitted}}))["a", "user"][name]
    generator = np.random.default_rng(12)
    value = generator.uniform(0, 1, (64, 200)).astype(np.float32) ** generator.uniform(
        1, 9, (64, 1)
    ).astype(np.float32)
    mask = np.arange(200) < generator.integers(1, 201, (64, 1))
    # As the evaluation reads the scores, which differ in the order of the candidates.
    measured = funnel.funnel_curves(jnp.asarray(value), jnp.asarray(value), jnp.asarray(mask), 5)
    choice = fitted.choose(np.asarray(measured.curves["score"], np.float64)[:, curves.ks - 1])
    expected = np.minimum(curves.ks[choice], mask.sum(axis=1))
    sizes = export.symbolic_shape("requests, candidates")
    types = (jax.ShapeDtypeStruct(sizes, of) for of in (np.float32, np.bool_))
    program = export.export(jax.jit(stored.passed))(*types)
    order = generator.permuted(np.tile(np.arange(200), (64, 1)), axis=1)
    shuffled = (np.take_along_axis(of, order, axis=1) for of in (value, mask))
    assert np.asarray(program.call(*shuffled)).tolist() == expected.tolist()
    assert name == "uniform" or len(set(expected)) > 5


def test_policies_are_those_of_a_config_and_are_measured_in_one_order():
    assert tuple(POLICIES) == keys.POLICIES
    assert policy.named(("learned", "uniform")) == ("uniform", "learned", "hindsight")
    assert policy.named(()) == ()
