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
from kd_ranker.sweep.members import sweep_members
from tests.faults import fault_of


def config_with(**changes):
    config = cascade("small")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
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


@pytest.mark.parametrize("part", ["", "plan", "join", "0", "12"])
def test_a_part_of_a_sweep_is_named_or_a_number(part):
    checks.validate(config_with(sweep__part=part))


@pytest.mark.parametrize("part", ["-1", "1.5", "all", "²"])
def test_another_part_of_a_sweep_is_refused(part):
    assert fault_of(check, config_with(sweep__part=part)) == (
        f"sweep.part={part!r} must be plan, the number of a cohort, join, or empty for all"
    )


def test_top_k_may_take_in_all_candidates_where_no_loss_reads_it():
    for loss, top_k in (("ranknet", 32), ("topk", 31)):
        check(config_with(distill__loss=loss, distill__top_k=top_k))


def test_a_batch_is_shared_by_all_devices_where_a_student_trains_alone():
    """In a sweep they may share its members instead."""
    config = config_with(batch__requests=6, parallel__members=4)
    checks.validate(config)
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
    fault = fault_of(check, config_with())
    assert fault.startswith("JAX_PLATFORMS=")
    assert fault.endswith("here and the CPU, as in JAX_PLATFORMS=cuda,cpu")


def test_each_movielens_config_names_its_set():
    names = [movielens(variant).data.name for variant in ("", "1m", "32m")]
    assert names == ["movielens_100k", "movielens_1m", "movielens_32m"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill__mode": "auxx"}, "distill.mode='auxx' does not exist; choose one of: aux, none"),
        ({"distill__loss": "l2"}, f"choose one of: {', '.join(sorted(LOSSES))}"),
        ({"sweep__modes": ("aux", "all")}, "sweep.modes='all' does not exist"),
        ({"sweep__part": "plan", "launcher": "ray"}, "sweep.part=plan with launcher='ray'"),
        ({"teacher__stage": "clicked"}, "choose one of: passed, retrieved, shown"),
        ({"distill__terms": ("bce", "l2")}, "distill.terms='l2' does not exist; choose one of"),
        (
            {"distill__terms": ("bce:rank",)},
            "distill.terms='bce:rank': signal='rank' does not exist; choose one of: logged, stage",
        ),
        ({"distill__terms": ("bce", "bce")}, "names a value twice"),
        ({"distill__terms": (1,)}, "distill.terms holds 1; it takes names"),
        (
            {"distill__terms": ("bce", "topk"), "distill__term_weights": (1.0,)},
            "distill.term_weights=(1.0,) has 1 numbers for the 2 of distill.terms=('bce', 'topk')",
        ),
        ({"distill__term_weights": (-1.0,)}, "distill.term_weights holds -1.0, which must not be"),
        (
            {"distill__terms": ("bce", "dftopk:stage"), "distill__top_k": 32},
            "distill.top_k=32 takes in all",
        ),
        ({"teacher__signal": "rank"}, "choose one of: logged, stage"),
        ({"distill__user_weight": -1.0}, "distill.user_weight=-1.0 must not be negative"),
        ({"batch__order": "random"}, "batch.order='random' does not exist; choose one of: s"),
        ({"data__name": "netflix"}, ", ".join(sorted(SOURCES))),
        ({"tasks": ("watch", "buy", "like")}, "'buy' does not exist; choose one of: like, share"),
        ({"tasks": ()}, "tasks=() must name one task or more, none of them twice"),
        ({"tasks": ("like", "like", "share")}, "must name one task or more, none of them twice"),
        ({"tasks": (1, 2, 3)}, "tasks holds 1; it takes names"),
        ({"value_weights": (1.0, 2.0)}, "value_weights=(1.0, 2.0) must have one weight per task"),
        ({"value_weights": (0.0, 0.0, 0.0)}, "must not be all 0"),
        ({"value_weights": ("a", "b", "c")}, "value_weights holds 'a'; it takes numbers"),
        (
            {"parallel__members": 3},
            "parallel.members=3 does not divide the 8 devices; take one of 1, 2, 4, 8, or 0",
        ),
        (
            {"parallel__members": 2, "batch__requests": 6},
            "batch.requests=6 cannot be shared by 8 devices with parallel.members=2; take a "
            "multiple of 4, or parallel.members of 4, 8",
        ),
        (
            {"parallel__members": 2, "sweep__axes__batch__requests": (8, 6)},
            "batch.requests=6 cannot be shared by 8 devices with parallel.members=2",
        ),
        (
            {"parallel__members": 2, "parallel__mapping": "pmap"},
            "parallel.mapping='pmap' cannot do parallel.members=2; take 'auto' or 'shard_map'",
        ),
        (
            {"parallel__tables": "sharded", "parallel__mapping": "pmap"},
            "parallel.mapping='pmap' cannot do parallel.tables='sharded'; take 'auto'",
        ),
        (
            {"parallel__deterministic": True, "parallel__mapping": "pmap"},
            "parallel.mapping='pmap' cannot do parallel.deterministic=True; take 'auto'",
        ),
        (
            {"parallel__mapping": "pmap", "batch__requests": 9},
            "batch.requests=9 cannot be shared by 8 devices; take a multiple of 8, or set parallel",
        ),
        ({"teacher__batch__requests": 9}, "teacher.batch.requests=9 cannot be shared by 8 devices"),
        ({"parallel__devices": 99}, "parallel.devices=99, but there are 8; 0 takes all"),
        ({"student__hidden": (16, 0)}, "student.hidden holds 0"),
        ({"distill__weight": float("nan")}, "distill.weight=nan must be a finite number"),
        ({"distill__top_k": 0}, "distill.top_k=0 must be greater than 0"),
        (
            {"distill__loss": "topk", "distill__top_k": 32},
            "distill.top_k=32 takes in all batch.candidates=32",
        ),
        ({"distill__loss": "dftopk", "distill__top_k": 33}, "top_k=33 takes in all"),
        ({"sweep__axes__distill__loss": ("topk",), "distill__top_k": 40}, "top_k=40 takes in all"),
        ({"batch__passed_share": 1.5}, "batch.passed_share=1.5 must lie in [0, 1]"),
        ({"sweep__weights": ()}, "sweep.weights is empty"),
        ({"sweep__seeds": (0, 0.5)}, "sweep.seeds holds 0.5; it takes whole numbers"),
        ({"sweep__seeds": (True,)}, "sweep.seeds holds True"),
        ({"funnel__passed": 200}, "each stage must be no larger than the one before"),
        (
            {"costs__student__candidate": 0.1},
            "are in your own unit, and costs.teacher.candidate=0 takes FLOPs",
        ),
        ({"costs__teacher__request": 5.0}, "costs.teacher.request=5.0 are in your own unit"),
        (
            {
                "costs__teacher__candidate": 2.0,
                "costs__student__candidate": 0.1,
                "sweep__axes__student__width": (8, 16),
            },
            "costs.student.candidate=0.1 is of one student, and sweep.axes.student has several",
        ),
        ({"funnel__report_at": (10, 101)}, "has a number above funnel.retrieved=100"),
        (
            {"distill__terms": ("bce",), "sweep__axes__distill__loss": ("topk",)},
            "sweep.axes.distill.loss changes nothing of distill.terms",
        ),
        (
            {"distill__loss": "topk:stage", "sweep__axes__teacher__signal": ("stage", "logged")},
            "sweep.axes.teacher.signal changes nothing of a loss with its own signal",
        ),
        ({"funnel__targets": (0.9, 1.0)}, "targets holds 1.0, which must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_that_says_what_to_change(changes, message):
    assert message in fault_of(check, config_with(**changes))


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
    fault = fault_of(checks.check_key, config_with(), key)
    assert fault.startswith(f"config key {key!r} does not exist; ")
    assert hint in fault


@pytest.mark.parametrize("key", ["seed", "train", "train.steps", "teacher.optimizer.name"])
def test_a_key_that_exists_is_fine(key):
    checks.check_key(config_with(), key)


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
