import functools

import jax
import pytest

from kd_ranker.config import checks
from kd_ranker.configs import (
    cascade,
    ebnerd,
    kuairand,
    letor,
    movielens,
    parquet,
    recflow,
    trec,
)
from kd_ranker.configs.sweeps import cascade as cascade_sweep
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.errors import UserError
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep import sweep_members
from tests.faults import fault_of


def config_with(changes):
    config = cascade("small")
    config.update_from_flattened_dict(changes)
    return config


def check(config):
    checks.validate(config)
    checks.check_students(sweep_members(config).values())


@pytest.mark.parametrize(
    "get_config",
    [
        *(functools.partial(cascade, variant) for variant in ("", "small")),
        *(functools.partial(cascade_sweep, of) for of in ("", "paper", "live", "sizes", "small")),
        *(functools.partial(recflow, variant) for variant in ("", "small", "lcron")),
        *(functools.partial(kuairand, variant) for variant in ("", "1k", "27k")),
        *(functools.partial(letor, variant) for variant in ("", "mslr", "istella_scores")),
        *(functools.partial(movielens, variant) for variant in ("", "1m", "32m")),
        *(ebnerd, trec),
    ],
)
def test_the_configs_are_valid(get_config):
    check(get_config())


@pytest.mark.parametrize(
    "changes",
    [
        *({"sweep.part": part} for part in ("", "plan", "join", "12")),
        {"distill.loss": "ranknet", "distill.top_k": 32},
        {"distill.loss": "topk", "distill.top_k": 31},
        # A sweep's members may be spread so that the requests fit.
        {"batch.requests": 6, "parallel.members": 4},
    ],
)
def test_values_at_the_limit_are_valid(changes):
    check(config_with(changes))


def test_a_batch_is_shared_by_all_devices_where_a_student_trains_alone():
    config = config_with({"batch.requests": 6})
    with pytest.raises(UserError, match="=6 cannot be shared by 8 devices; take a mult"):
        checks.check_single(config)
    config.parallel.devices = 3
    checks.check_single(config)


@pytest.mark.parametrize("name", ["devices", "local_devices"])
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no tpu (set JAX_PLATFORMS='')")])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax, name, fail)
    fault = fault_of(check, config_with({}))
    assert fault.startswith("JAX_PLATFORMS=")
    assert fault.endswith("here and the CPU, as in JAX_PLATFORMS=cuda,cpu")


def test_each_movielens_config_names_its_set():
    names = [movielens(variant).data.name for variant in ("", "1m", "32m")]
    assert names == ["movielens_100k", "movielens_1m", "movielens_32m"]


LIKE_LOSS = "distill.term_weights=(1.0,) must have one number per term of distill.terms=('bce', 't"
SHARED = (
    "batch.requests=6 cannot be shared by 8 devices with parallel.members=2; take a multiple of 4"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.mode": "auxx"}, "distill.mode='auxx' does not exist; choose one of: aux, none"),
        ({"distill.loss": "l2"}, f"choose one of: {', '.join(sorted(LOSSES))}"),
        ({"data.name": "netflix"}, ", ".join(sorted(SOURCES))),
        ({"sweep.modes": ("aux", "all")}, "sweep.modes='all' does not exist"),
        ({"distill.terms": ("bce", "l2")}, "distill.terms='l2' does not exist; choose one of"),
        ({"distill.terms": ("bce:rank",)}, "'bce:rank': signal='rank' does not exist; choose one"),
        ({"distill.terms": ("bce", "bce")}, "names a value twice"),
        ({"distill.terms": (1,)}, "distill.terms holds 1; it takes names"),
        ({"distill.terms": ("bce", "topk"), "distill.term_weights": (1.0,)}, LIKE_LOSS),
        ({"distill.term_weights": (-1.0,)}, "distill.term_weights holds -1.0, which must not be"),
        ({"distill.weight": float("nan")}, "distill.weight=nan must be a finite number"),
        ({"distill.top_k": 0}, "distill.top_k=0 must be greater than 0"),
        ({"distill.loss": "topk", "distill.top_k": 32}, "top_k=32 takes in all batch.candidates"),
        ({"distill.terms": ("bce", "dftopk:stage"), "distill.top_k": 33}, "top_k=33 takes in all"),
        ({"sweep.axes.distill.loss": ("topk",), "distill.top_k": 40}, "top_k=40 takes in all"),
        ({"tasks": ("watch", "buy", "like")}, "'buy' does not exist; choose one of: like, share"),
        ({"tasks": ()}, "tasks=() must name one task or more, none of them twice"),
        ({"tasks": ("like", "like", "share")}, "must name one task or more, none of them twice"),
        ({"value_weights": (1.0, 2.0)}, "value_weights=(1.0, 2.0) must have one weight per task"),
        ({"value_weights": (0.0, 0.0, 0.0)}, "('watch', 'like', 'share'), not all 0"),
        ({"value_weights": ("a", "b", "c")}, "value_weights holds 'a'; it takes numbers"),
        *(({"sweep.part": of}, f"sweep.part={of!r} must be plan") for of in ("-1", "1.5", "²")),
        ({"sweep.part": "plan", "launcher": "ray"}, "sweep.part=plan with launcher='ray'"),
        ({"parallel.devices": 99}, "parallel.devices=99, but there are 8; 0 takes all"),
        ({"parallel.members": 3}, "parallel.members=3 does not divide the 8 devices"),
        ({"parallel.members": 2, "batch.requests": 6}, SHARED),
        ({"parallel.members": 2, "sweep.axes.batch.requests": (8, 6)}, SHARED),
        ({"parallel.mapping": "pmap", "batch.requests": 9}, "=9 cannot be shared by 8 devices; ta"),
        ({"teacher.batch.requests": 9}, "teacher.batch.requests=9 cannot be shared by 8 devices"),
        *(
            ({f"parallel.{key}": value, "parallel.mapping": "pmap"}, "take 'auto' or 'shard_map'")
            for key, value in {"members": 2, "tables": "sharded", "deterministic": True}.items()
        ),
        ({"student.hidden": (16, 0)}, "student.hidden holds 0"),
        ({"batch.passed_share": 1.5}, "batch.passed_share=1.5 must lie in [0, 1]"),
        ({"funnel.targets": (0.9, 1.0)}, "targets holds 1.0, which must lie between 0 and 1"),
        ({"sweep.weights": ()}, "sweep.weights is empty"),
        ({"sweep.seeds": (0, 0.5)}, "sweep.seeds holds 0.5; it takes whole numbers"),
        ({"sweep.seeds": (True,)}, "sweep.seeds holds True"),
        ({"funnel.passed": 200}, "each stage must be no larger than the one before"),
        ({"funnel.report_at": (10, 101)}, "has a number above funnel.retrieved=100"),
        ({"costs.student.candidate": 0.1}, "in your own unit, and costs.teacher.candidate=0 takes"),
        ({"costs.teacher.request": 5.0}, "in your own unit, and costs.teacher.candidate=0 takes"),
        (
            {
                "costs.teacher.candidate": 2.0, "costs.student.candidate": 0.1,
                "sweep.axes.student.width": (8, 16),
            },
            "costs.student.candidate=0.1 is of one student, and sweep.axes.student has several",
        ),
        (
            {"distill.terms": ("bce",), "sweep.axes.distill.loss": ("topk",)},
            "sweep.axes.distill.loss changes nothing of distill.terms",
        ),
        (
            {"distill.loss": "topk:stage", "sweep.axes.teacher.signal": ("stage", "logged")},
            "sweep.axes.teacher.signal changes nothing of a loss with its own signal",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_that_says_what_to_change(changes, message):
    assert message in fault_of(check, config_with(changes))


@pytest.mark.parametrize(
    ("get_config", "changes", "message"),
    [
        (cascade, {"exploration": 1.5}, "data.exploration=1.5 must lie in [0, 1]"),
        (movielens, {"test_share": 1.0}, "data.test_share=1.0 must lie in [0, 1)"),
        (kuairand, {"test": "biased"}, "data.test='biased' does not exist; choose one of: random"),
        (recflow, {"train_days": (20240217,)}, "data.train_days holds 20240217; it takes names"),
        (parquet, {"split": "item"}, "choose one of: column, request, time, user"),
    ],
)  # fmt: skip
def test_a_fault_of_a_source_is_one_line_before_it_is_opened(get_config, changes, message):
    config = get_config()
    config.data.update(changes)
    assert message in fault_of(check, config)


def test_a_key_that_a_config_file_misspells_is_refused():
    config = cascade()
    config.distill.wieght = 3.0
    assert "'distill.wieght' does not exist; did you mean 'distill.weight'?" in fault_of(
        check, config
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("bogus", "docs/config.md lists the keys"),
        ("train.step", "did you mean 'train.steps'?"),
        ("distil.mode", "did you mean 'distill.mode'?"),
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


def test_a_config_of_another_version_is_refused_with_the_keys_that_it_lacks():
    config = cascade_sweep()
    del config.train["steps"]
    with pytest.raises(UserError, match=r"lacks train\.steps; it is that of another version"):
        check(config)
