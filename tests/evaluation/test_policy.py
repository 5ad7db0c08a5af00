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
from kd_ranker.evaluation.policy import POLICIES, Curves, Threshold, Uniform


def curves_of(requests: int, seed: int, known: float, candidates: int = 200) -> Curves:
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


def passed_by(curves: Curves, choice):
    return curves.scored[np.arange(len(choice)), choice]


@pytest.mark.parametrize("target", [0.9, 0.99])
def test_uniform_is_the_smallest_k_that_keeps_the_target(target):
    curves = curves_of(50, 0, 1)
    share = curves.captured.sum(axis=0) / curves.captured[:, -1].sum()
    expected = min(k for k, kept in zip(curves.ks, share, strict=True) if kept >= target)
    choice = Uniform.fit(curves, target).choose(curves.score)
    assert set(curves.ks[choice]) == {expected}
    assert curves.kept(choice) >= target


def test_threshold_is_the_largest_that_keeps_the_target():
    curves = curves_of(30, 1, 1)

    def kept(threshold):
        passed = [max(int((row >= threshold).sum()), 1) - 1 for row in curves.score]
        return curves.captured[range(30), passed].sum() / curves.captured[:, -1].sum()

    choice = Threshold.fit(curves, 0.95).choose(curves.score)
    best = max(of for of in np.unique(curves.score) if kept(of) >= 0.95)
    expected = [max(int((row >= best).sum()), 1) - 1 for row in curves.score]
    assert choice.tolist() == expected


def test_hindsight_is_no_worse_than_any_choice_that_keeps_as_much():
    curves = curves_of(4, 2, 1, candidates=12)
    choice = policy.hindsight(curves, 0.95)
    kept, passed = curves.kept(choice), passed_by(curves, choice).sum()
    assert kept >= 0.95
    for other in itertools.product(range(len(curves.ks)), repeat=4):
        if curves.kept(np.array(other)) >= kept - 1e-12:
            assert passed_by(curves, np.array(other)).sum() >= passed


def test_learned_saves_where_scores_tell_how_hard_a_request_is():
    fitted, tested = curves_of(1500, 3, 1), curves_of(1500, 4, 1)
    target = 0.99
    passed, kept = {}, {}
    for name, of in POLICIES.items():
        choice = of.fit(fitted, target).choose(tested.score)
        passed[name], kept[name] = passed_by(tested, choice).mean(), tested.kept(choice)
    assert kept["learned"] == pytest.approx(target, abs=0.003)
    assert passed["learned"] < 0.9 * passed["uniform"]
    assert passed["learned"] > passed_by(tested, policy.hindsight(tested, target)).mean()


def test_learned_is_uniform_where_scores_tell_nothing():
    fitted, tested = curves_of(600, 5, 0), curves_of(600, 6, 0)
    uniform, learned = (
        POLICIES[name].fit(fitted, 0.99).choose(tested.score) for name in ("uniform", "learned")
    )
    assert len(set(learned)) == 1
    assert abs(learned[0] - uniform[0]) <= 1


@pytest.mark.parametrize("name", POLICIES)
def test_requests_with_fewer_candidates_and_one_request(name):
    curves = curves_of(40, 7, 1)
    few = np.where(np.arange(40) % 2, 200, 9)
    last = (curves.ks <= few[:, None]).sum(axis=1) - 1
    score = np.maximum(curves.score, curves.score[range(40), last][:, None])
    some = curves._replace(score=score, scored=np.minimum(curves.scored, few[:, None]))
    fitted = POLICIES[name].fit(some, 0.9)
    choice = fitted.choose(score)
    assert some.kept(choice) >= 0.85
    assert passed_by(some, policy.hindsight(some, 0.9))[::2].max() <= 9
    # The same requests give the same policy.
    assert choice.tolist() == POLICIES[name].fit(some, 0.9).choose(score).tolist()
    one = curves_of(1, 8, 1)
    assert POLICIES[name].fit(one, 0.9).choose(one.score).shape == (1,)


def sums_of(curves):
    more = {"true_value_captured": 2 * curves.captured, "covered_user_value": 3 * curves.captured}
    return more | {
        "score": curves.score, "value_captured": curves.captured, "scored": curves.scored
    }  # fmt: skip


def sums_by_policy(sums, ks, name):
    """Those of a policy that is fitted to the same requests."""
    return policy.sums(policy.fit(sums, ks, (name,)), sums, ks, (name,))


def test_sums_are_the_curves_at_the_chosen_k():
    curves = curves_of(20, 10, 1)
    found = sums_by_policy(sums_of(curves), curves.ks, "uniform")
    place = Uniform.fit(curves, TARGET).place
    captured = curves.captured[:, place]
    np.testing.assert_allclose(found["policy_scored/uniform"], curves.ks[place])
    np.testing.assert_allclose(found["policy_value_captured/uniform"], captured)
    np.testing.assert_allclose(found["policy_true_value_captured/uniform"], 2 * captured)
    assert found["policy_scored/hindsight"].sum() <= found["policy_scored/uniform"].sum()


@pytest.mark.parametrize("factor", [np.nan, 0.0])
def test_nothing_is_known_of_a_diverged_ranker_or_without_value(factor):
    curves = curves_of(20, 10, 1)
    sums = sums_of(curves._replace(captured=factor * curves.captured))
    found = sums_by_policy(sums, curves.ks, "learned")
    assert np.isnan(found["policy_scored/learned"]).all()


@pytest.mark.parametrize("name", POLICIES)
def test_a_stored_and_exported_policy_chooses_the_measured_k(name):
    curves = curves_of(300, 11, 1)
    fitted = {("a", "user"): {name: POLICIES[name].fit(curves, 0.95)}}
    stored = policy.from_json(policy.to_json(fitted))["a", "user"][name]
    generator = np.random.default_rng(12)
    value = generator.uniform(0, 1, (64, 200)).astype(np.float32) ** generator.uniform(
        1, 9, (64, 1)
    ).astype(np.float32)
    mask = np.arange(200) < generator.integers(1, 201, (64, 1))
    # As the evaluation reads the scores, which differ in the order of the candidates.
    measured = funnel.funnel_curves(jnp.asarray(value), jnp.asarray(value), jnp.asarray(mask), 5)
    score = np.asarray(measured.score, np.float64)[:, curves.ks - 1]
    choice = fitted["a", "user"][name].choose(score)
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
