import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.terms import (
    Term,
    check_terms,
    format_terms,
    parse_terms,
    without_weights,
)
from kd_ranker.errors import UserError

TERMS = st.builds(
    Term,
    st.sampled_from(sorted(LOSSES)),
    st.sampled_from(["scores", "stage"]),
    st.floats(0, 1e20),
)


def fields_of(terms):
    return [(term.loss, term.signal, term.weight) for term in terms]


def test_a_text_of_two_terms_is_read_by_hand():
    terms = parse_terms("softmax + 0.5 * softmax:stage")

    assert fields_of(terms) == [("softmax", "scores", 1.0), ("softmax", "stage", 0.5)]


@given(st.lists(TERMS, min_size=1, max_size=4))
def test_terms_that_are_printed_are_read_back(terms):
    assert fields_of(parse_terms(format_terms(tuple(terms)))) == fields_of(terms)


def test_a_term_may_weigh_nothing():
    assert fields_of(parse_terms("0 * bce")) == [("bce", "scores", 0.0)]


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "much"])
def test_other_weights_are_refused(weight):
    with pytest.raises(UserError, match=f"the weight '{weight}' is not a number of at least 0"):
        parse_terms(f"{weight} * bce")


@pytest.mark.parametrize("text", ["unknown", "bce:unknown", "", "bce +"])
def test_an_unknown_loss_or_signal_is_refused(text):
    with pytest.raises(UserError):
        check_terms(text)


def test_without_weights_all_terms_weigh_one():
    terms = without_weights(parse_terms("3 * bce + 0.5 * topk:stage"))

    assert [term.weight for term in terms] == [1.0, 1.0]
