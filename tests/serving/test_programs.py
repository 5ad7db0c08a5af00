import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kd_ranker.batch import IN_BATCH
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.models.model import score
from kd_ranker.models.student import STUDENTS, MultiInterest
from kd_ranker.models.teacher import TEACHERS
from kd_ranker.serving import check, programs
from tests.random_batches import (
    SPECS,
    STUDENT,
    TEACHER,
    make_model,
    random_batch,
    random_items,
)

WEIGHTS = (1.0, 2.0, 4.0)
BLEND = MODES["aux"].serve["blend"]

# A ranker, what of its config is not the default, and the features of the dataset.
CASES = {
    "two_tower, history": ("two_tower", {"history": "mean"}, "categories"),
    "multi_interest, history": ("multi_interest", {"history": "mean"}, "plain"),
    "multi_interest, hashed": (
        "multi_interest",
        {"history": "mean", "user_rows": 7, "item_rows": 11, "category_rows": 9},
        "categories",
    ),
    "final_ranker": ("final_ranker", {}, "plain"),
    "final_ranker, categories": ("final_ranker", {"user_rows": 7}, "categories"),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def trained_ranker(name, changes, spec_name):
    """A ranker of which training has met all ids but every third row's."""
    config = (STUDENT if name in STUDENTS else TEACHER).copy_and_resolve_references()
    config.update(changes)
    spec = SPECS[spec_name]
    model, parameters = make_model({**STUDENTS, **TEACHERS}[name], 6, config, 0, spec)
    met = {name: table.at[::3, config.width].set(0) for name, table in parameters.tables.items()}
    items = random_items(0, spec)
    return programs.Servable(model, parameters.replace(tables=met), spec, items, BLEND, WEIGHTS)


def batch_of(trained, requests=3, candidates=20, beyond=True):
    """A batch, which holds ids that no table has a row of."""
    batch = random_batch(0, requests, candidates, trained.spec)
    hashed = any(table.hashed for table in trained.model.embedding.tables.values())
    if beyond and not hashed:
        users, ids = batch.user_id.copy(), batch.item_id.copy()
        users[0], ids[0, 0], ids[-1, -1] = 30, 50, -1
        batch = batch.replace(user_id=users, item_id=ids)
    return batch


def arrays_of(batch):
    return {field.name: np.asarray(getattr(batch, field.name)) for field in IN_BATCH}


def expected(trained, batch):
    def answer(parameters, batch, items):
        return BLEND(score(trained.model, parameters, batch, items))

    return np.asarray(jax.jit(answer)(trained.parameters, batch, trained.items))


def opened(exported, open_program):
    """The programs, each opened once, as a server does."""
    return {
        name: replace(program, function=open_program(program))
        for name, program in exported.programs.items()
    }


def as_jax(program):
    """What `jax.export.deserialize` makes of its bytes."""
    return export.deserialize(bytearray(programs.to_jax(program))).call


def as_onnx(program):
    onnxruntime = pytest.importorskip("onnxruntime", reason="see scripts/test_onnx.sh")
    session = onnxruntime.InferenceSession(programs.to_onnx(program))

    def run(arrays):
        results = session.run(list(program.outputs), arrays)
        return dict(zip(program.outputs, results, strict=True))

    return run


open_formats = pytest.mark.parametrize("open_program", [as_jax, as_onnx])


@open_formats
@over_cases
def test_programs_give_the_probabilities_of_the_ranker(case, open_program):
    if open_program is as_onnx:
        pytest.importorskip("jax2onnx", reason="see scripts/test_onnx.sh")
    trained = trained_ranker(*case)
    exported = programs.make_programs(trained)
    read = opened(exported, open_program)
    assert list(read) == (["user", "item", "score"] if case[0] in STUDENTS else ["rank"])
    for requests, candidates in ((3, 20), (1, 1), (2, 7)):
        batch = batch_of(trained, requests, candidates, beyond=candidates > 1)
        found = check.rank(read, arrays_of(batch) | exported.tables)
        probability = np.asarray(found["probability"])
        np.testing.assert_allclose(probability, expected(trained, batch), atol=1e-6)
        np.testing.assert_allclose(found["value"], probability @ np.array(WEIGHTS), rtol=1e-5)


def test_a_student_without_parts_is_exported_whole():
    class Whole(MultiInterest):
        users = None

        def __call__(self, batch, rows, items):
            return jnp.zeros((*batch.item_id.shape, 6))

    trained = trained_ranker("multi_interest", {}, "categories")
    model, parameters = make_model(Whole, 6, STUDENT, 0, trained.spec)
    whole = programs.make_programs(trained._replace(model=model, parameters=parameters))
    assert list(whole.programs) == ["rank"]


@open_formats
def test_a_new_item_has_the_embedding_of_its_program(open_program):
    """Its row goes before the last one, which stays that of unknown items."""
    trained = trained_ranker("multi_interest", {}, "categories")
    exported = programs.make_programs(trained)
    read, held = opened(exported, open_program), exported.tables
    known = programs.inputs_of_items(trained, np.array([4, 9], np.int32))
    embedding = np.asarray(read["item"](known | held)["item_embedding"])
    np.testing.assert_allclose(embedding, held["item_embedding"][[4, 9]], atol=1e-6)
    batch = batch_of(trained, beyond=False)
    batch.item_id[0, :2] = 4, 70  # the latter is unknown
    same = batch.replace(item_id=batch.item_id.copy())
    same.item_id[0, 0] = 50  # the first new one
    grown = np.insert(held["item_embedding"], 50, embedding[0], axis=0)
    before = check.rank(read, arrays_of(batch) | held)
    after = check.rank(read, arrays_of(same) | held | {"item_embedding": grown})
    np.testing.assert_allclose(before["probability"], after["probability"], atol=1e-6)


def test_what_onnx_lacks_is_named():
    pytest.importorskip("jax2onnx", reason="see scripts/test_onnx.sh")

    def lacking(arrays):
        shape = jax.ShapeDtypeStruct(arrays["x"].shape, arrays["x"].dtype)
        return {"y": jax.pure_callback(lambda x: x, shape, arrays["x"])}

    described = programs.typed(("requests", 3), np.float32)
    program = programs.Program("user", lacking, {"x": described}, {"y": described})
    with pytest.raises(UserError, match=r"program 'user' cannot .* 'pure_callback'; use only"):
        programs.to_onnx(program)


def test_without_the_converter_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    described = programs.typed(("requests",), np.float32)
    program = programs.Program("user", dict, {"x": described}, {"x": described})
    with pytest.raises(UserError, match="ONNX needs the extra `onnx`"):
        programs.to_onnx(program)
