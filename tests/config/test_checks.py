"""Which configs are valid, and the line that names what is wrong with the others."""

import functools

import jax
import pytest

from kd_ranker import configs
from kd_ranker.config import checks
from kd_ranker.config.key import Bound
from kd_ranker.config.keys import DATA_KEYS, KEYS
from kd_ranker.configs import cascade, kuairand, movielens, parquet, recflow, trec
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.errors import UserError
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep import sweep_members
from tests.faults import fault_of

VARIANTS = {
    "cascade": ("", "small"),
    "sweeps.cascade": ("", "paper", "live", "sizes", "small"),
    "recflow": ("", "small", "lcron"),
    "kuairand": ("", "1k", "27k"),
    "letor": ("", "mslr", "istella_scores"),
    "movielens": ("", "1m", "32m"),
    "ebnerd": ("",),
    "trec": ("",),
}


def config_with(changes):
    config = cascade("small")
    config.update_from_flattened_dict(changes)
    return config


def check(config):
    checks.validate(config)
    checks.check_students(sweep_members(config).values())


@pytest.mark.parametrize(
    ("name", "variant"), [(name, of) for name, variants in VARIANTS.items() for of in variants]
)
def test_the_configs_are_valid(name, variant):
    get_config = functools.reduce(getattr, name.split("."), configs)
    check(get_config(variant) if variant else get_config())


EVERY = [*KEYS.values(), *(key for keys in DATA_KEYS.values() for key in keys.values())]


def test_the_defaults_are_valid_and_each_key_has_a_meaning_and_an_influence():
    for key in EVERY:
        if key.name != "data.name":
            key.check(key.default)
        assert key.help, key.name
        assert not key.help.endswith("."), key.name
        assert key.influences, key.name
        assert key.sweep, key.name
        assert isinstance(key.allowed, Bound) <= (key.type in (int, float)), key.name


@pytest.mark.parametrize(
    "changes",
    [
        *({"sweep.part": part} for part in ("", "plan", "join", "12")),
        {"distill.loss": "ranknet", "distill.top_k": 32},
        {"distill.loss": "topk", "distill.top_k": 31},
        # A sweep's members may be spread so that the requests fit.
        {"batch.requests": 6, "parallel.members": 4},
        {"sweep.modes": (), "sweep.weights": (), "sweep.seeds": ()},
    ],
)
def test_values_at_the_limit_are_valid(changes):
    check(config_with(changes))


LIKE_LOSS = "distill.term_weights=(1.0,) must have one number per term of distill.terms=('bce', 't"
OWN_UNIT = "in your own unit, and costs.teacher.candidate=0 takes"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.mode": "auxx"}, "distill.mode='auxx' does not exist; choose one of: aux, none"),
        ({"distill.loss": "l2"}, f"choose one of: {', '.join(sorted(LOSSES))}"),
        ({"data.name": "netflix"}, ", ".join(sorted(SOURCES))),
        ({"distill.terms": ("bce", "l2")}, "distill.terms='l2' does not exist; choose one of"),
        ({"distill.terms": ("bce:rank",)}, "'bce:rank': signal='rank' does not exist; choose one"),
        ({"distill.terms": (1,)}, "distill.terms has 1; it takes names"),
        ({"distill.terms": ("bce", "topk"), "distill.term_weights": (1.0,)}, LIKE_LOSS),
        ({"distill.weight": float("nan")}, "distill.weight has nan; it takes numbers ≥ 0"),
        ({"distill.top_k": 0}, "distill.top_k has 0; it takes whole numbers > 0"),
        ({"student.hidden": (16, -1)}, "student.hidden has -1; it takes whole numbers > 0"),
        ({"batch.passed_share": 1.5}, "passed_share has 1.5; it takes numbers in [0, 1]"),
        ({"funnel.targets": (0.9, 1.0)}, "targets has 1.0; it takes numbers in (0, 1)"),
        ({"sweep.seeds": (0, 0.5)}, "sweep.seeds has 0.5; it takes whole numbers"),
        ({"sweep.seeds": (True,)}, "sweep.seeds has True"),
        ({"value_weights": ("a", "b", "c")}, "value_weights has 'a'; it takes numbers"),
        ({"distill.loss": "topk", "distill.top_k": 32}, "top_k=32 takes in all batch.candidates"),
        ({"sweep.axes.distill.terms": (("bce", "dftopk"),), "distill.top_k": 40}, "top_k=40 takes"),
        ({"tasks": ("watch", "buy", "like")}, "'buy' does not exist; choose one of: like, share"),
        ({"tasks": ("like", "like", "share")}, "must name one task or more, none of them twice"),
        ({"value_weights": (1.0, 2.0)}, "value_weights=(1.0, 2.0) must have one weight per task"),
        ({"value_weights": (0.0, 0.0, 0.0)}, "('watch', 'like', 'share'), not all 0"),
        *(({"sweep.part": of}, f"sweep.part={of!r} must be plan") for of in ("-1", "1.5", "²")),
        ({"data.dir": "gs://bucket/data"}, "datasets need a folder of this machine"),
        ({"parallel.devices": 99}, "parallel.devices=99, but there are 8; 0 takes all"),
        *(({"parallel.members": of}, f"={of} does not divide the 8 devices") for of in (3, 16)),
        ({"parallel.members": 2, "sweep.axes.batch.requests": (8, 6)}, "=6 cannot be shared by 4"),
        ({"parallel.mapping": "pmap", "batch.requests": 9}, "=9 cannot be shared by 8 devices; ta"),
        ({"teacher.batch.requests": 9}, "teacher.batch.requests=9 cannot be shared by 8 devices"),
        *(
            ({f"parallel.{key}": value, "parallel.mapping": "pmap"}, "take 'auto' or 'shard_map'")
            for key, value in {"members": 2, "tables": "sharded", "deterministic": True}.items()
        ),
        ({"parallel.processes": True, "parallel.devices": 2}, "processes use all of their devices"),
        ({"funnel.passed": 200}, "each stage must be no larger than the one before"),
        ({"funnel.report_at": (10, 101)}, "has a number above funnel.retrieved=100"),
        ({"costs.student.candidate": 0.1}, OWN_UNIT),
        ({"costs.teacher.request": 5.0}, OWN_UNIT),
        (
            {
                "costs.teacher.candidate": 2.0, "costs.student.candidate": 0.1,
                "sweep.axes.student.width": (8, 16),
            },
            "costs.student.candidate=0.1 is of one student, and sweep.axes.student has several",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_that_says_what_to_change(changes, message):
    assert message in fault_of(check, config_with(changes))


@pytest.mark.parametrize(
    ("get_config", "changes", "message"),
    [
        (cascade, {"exploration": 1.5}, "data.exploration has 1.5; it takes numbers in [0, 1]"),
        (movielens, {"test_share": 1.0}, "data.test_share has 1.0; it takes numbers in [0, 1)"),
        (kuairand, {"test": "biased"}, "data.test='biased' does not exist; choose one of: random"),
        (recflow, {"train_days": (20240217,)}, "data.train_days has 20240217; it takes names"),
        (parquet, {"split": "item"}, "choose one of: column, request, time, user"),
        (parquet, {"extends": "old", "split": "user"}, "data.extends needs data.split='time'"),
    ],
)  # fmt: skip
def test_a_fault_of_a_source_is_one_line_before_it_is_opened(get_config, changes, message):
    config = get_config()
    config.data.update(changes)
    assert message in fault_of(check, config)


def test_a_batch_is_shared_by_all_devices_where_a_student_trains_alone():
    config = config_with({"batch.requests": 6})
    fault = fault_of(checks.validate, config, single=True)
    assert "batch.requests=6 cannot be shared by 8 devices; take a mult" in fault
    config.update_from_flattened_dict({"parallel.devices": 3, "teacher.batch.requests": 9})
    checks.validate(config, single=True)


@pytest.mark.parametrize("name", ["device_count", "local_devices"])
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no tpu (set JAX_PLATFORMS='')")])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax, name, fail)
    fault = fault_of(check, config_with({}))
    assert fault.startswith("JAX_PLATFORMS=")
    assert fault.endswith("here and the CPU, as in JAX_PLATFORMS=cuda,cpu")


def test_a_config_file_has_all_keys_and_no_others():
    config = cascade()
    config.distill.wieght = 3.0
    fault = fault_of(check, config)
    assert "'distill.wieght' does not exist; did you mean 'distill.weight'?" in fault
    del config.distill["wieght"], config.train["steps"]
    assert "lacks train.steps; it is that of another version" in fault_of(check, config)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("bogus", "docs/config.md lists the keys"),
        ("train.step", "did you mean 'train.steps'?"),
        ("affine", "did you mean 'distill.affine'?"),
        ("learning_rate", "'optimizer.learning_rate' or 'teacher.optimizer.learning_rate'"),
        ("seed.of.all", "docs/config.md lists the keys"),
    ],
)
def test_an_unknown_key_is_named_whole_with_a_hint(key, hint):
    fault = fault_of(checks.check_key, config_with({}), key)
    assert fault.startswith(f"config key {key!r} does not exist; ")
    assert hint in fault


@pytest.mark.parametrize(
    ("get_config", "known"), [(cascade, ":items, :small"), (movielens, ":1m, :32m"), (trec, "none")]
)
def test_an_unknown_variant_names_those_that_exist(get_config, known):
    with pytest.raises(UserError, match=f"no variant :huge; the variants are: {known}"):
        get_config("huge")
