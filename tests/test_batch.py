import dataclasses

import jax
import numpy as np
import pytest

from kd_ranker.batch import (
    FIELDS,
    IN_BATCH,
    STORED,
    CandidateBatch,
    Category,
    FeatureSpec,
    Request,
    empty_batch,
)
from kd_ranker.errors import UserError
from tests.random_batches import CATEGORY_SPEC

# No two widths are the same.
SPEC = dataclasses.replace(
    CATEGORY_SPEC,
    context_features=8,
    history_features=4,
    categories=(
        *(Category(str(width), "request", 9, width) for width in (1, 9)),
        Category("reasons", "candidate", 5, 7),
    ),
)
# How many entries of a field an annotation gives a request, on disk and in a step.
NUMBERS = {
    "request": ((), ()),
    "event": (("H",), ("H",)),
    "candidate": (("N",), ("N",)),
    "shown": (("S",), ("labeled",)),
    "scored": (("A",), ("num_scored",)),
    "known": (("V",), ()),
}


def test_structs_have_the_tables_fields_types_and_shapes():
    width_of = {}
    for place, (struct, fields) in enumerate(((Request, STORED), (CandidateBatch, IN_BATCH))):
        annotations = {field.name: field.type for field in dataclasses.fields(struct)}
        assert sorted(annotations) == sorted(field.name for field in fields)
        for field in fields:
            # One that may be None is a union.
            annotation = annotations[field.name]
            annotation = getattr(annotation, "__args__", (annotation,))[0]
            dtype, shape = (field.stored, field.dtype)[place], field.shape(SPEC)
            if annotation in (int, str):
                assert np.issubdtype(dtype, np.integer) == (annotation is int), field
                assert not shape
                continue
            letters = annotation.dim_str.split()
            expected = (*("R",) * place, *NUMBERS[field.of][place])
            assert tuple(letters[: len(expected)]) == expected, field
            # A letter has one meaning, and the two structs agree on it.
            for letter, width in zip(letters[len(expected) :], shape, strict=True):
                assert width_of.setdefault(letter, width) == width, field
            assert np.dtype(dtype).name in annotation.dtypes, field
    assert set(FIELDS) == {*STORED, *IN_BATCH}


def test_the_first_candidates_of_a_batch_keep_all_else():
    few = empty_batch(SPEC, 13, 4)
    many = empty_batch(SPEC, 13, 11)

    jax.tree.map(np.testing.assert_array_equal, many.first(4), few)

    assert few.num_labeled == 4
    assert few.num_scored == 4
    assert few.candidate_mask.shape == (13, 4)


def test_a_spec_comes_back_from_its_json():
    assert FeatureSpec.from_json(CATEGORY_SPEC.to_json()) == CATEGORY_SPEC
    with pytest.raises(UserError, match="category 'color': of='user' does not exist"):
        Category("color", of="user", size=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_signal": "nope"}, "teacher_signal='nope' does not exist; choose one of: prob"),
        (
            {"item_features": 2, "cheap_item_features": 3},
            "cheap_item_features=3 counts the first of item",
        ),
        ({"user_features": "2"}, "user_features='2' must be a whole number, at least 0"),
        ({"context_features": 1.5}, "context_features=1.5 must be a whole number, at least 0"),
        ({"num_items": -1}, "num_items=-1 must be a whole number, at least 0"),
        ({"tasks": ("click.7d",)}, "task 'click.7d': the name of a task is a text without dots"),
        ({"tasks": (1, 2)}, "task 1: the name of a task is a text without dots"),
        ({"tasks": ("",)}, "task '': the name of a task is a text without dots"),
        ({"tasks": ("buy", "buy")}, "tasks=.* must name one task or more, none of them twice"),
        ({"tasks": ()}, "tasks=.* must name one task or more, none of them twice"),
        ({"tasks": "buy"}, "tasks='buy' must be a tuple of names"),
    ],
)
def test_a_spec_of_impossible_sizes_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CATEGORY_SPEC, **change)


@pytest.mark.parametrize("change", [{"size": "x"}, {"size": 0}, {"length": 0}, {"length": 1.5}])
def test_a_category_has_at_least_one_value(change):
    with pytest.raises(UserError, match=r"'color': .* must be a whole number, at least 1"):
        Category(**{"name": "color", "of": "item", "size": 3, **change})
