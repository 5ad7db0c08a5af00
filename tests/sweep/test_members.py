import pytest

from configs import cascade
from kd_ranker.config import settings
from kd_ranker.errors import UserError
from kd_ranker.sweep.members import sweep_members


def config_of(**sweep):
    config = cascade.get_config("small")
    config.sweep.update(sweep)
    return config


def test_modes_times_weights_times_seeds_and_none_once_a_seed():
    members = sweep_members(config_of(weights=(0.5, 2), seeds=(0, 7)))
    assert list(members) == [
        f"{member}-seed{seed}"
        for seed in (0, 7)
        for member in (
            "none", "aux-weight0.5", "aux-weight2.0", "shared-weight0.5", "shared-weight2.0",
        )
    ]  # fmt: skip
    member = members["aux-weight2.0-seed7"]
    assert (member.distill.mode, member.distill.weight, member.seed) == ("aux", 2.0, 7)
    assert members["none-seed0"].distill.weight == 0


def test_data_seeds_repeat_the_whole_population():
    members = sweep_members(config_of(modes=("none", "shared"), data_seeds=(0, 3)))
    assert list(members) == [
        "none-seed0", "shared-weight1.0-seed0", "none-seed0-data3", "shared-weight1.0-seed0-data3",
    ]  # fmt: skip
    assert [member.batch.seed for member in members.values()] == [0, 0, 3, 3]


def test_numbers_are_swept_and_the_tables_rate_keeps_its_ratio():
    config = config_of(
        modes=("none", "shared"), temperatures=(1.0, 2.0), learning_rates=(0.01, 0.02)
    )
    config.optimizer.learning_rate, config.optimizer.table_learning_rate = 0.01, 0.006
    members = sweep_members(config)
    assert list(members) == [
        "none-seed0",
        "none-rate0.02-seed0",
        "shared-weight1.0-seed0",
        "shared-weight1.0-temperature2.0-seed0",
        "shared-weight1.0-rate0.02-seed0",
        "shared-weight1.0-temperature2.0-rate0.02-seed0",
    ]
    member = members["shared-weight1.0-temperature2.0-rate0.02-seed0"]
    assert member.distill.temperature == 2.0
    assert member.optimizer.learning_rate == 0.02
    assert member.optimizer.table_learning_rate == pytest.approx(0.012)
    assert members["shared-weight1.0-seed0"].optimizer.table_learning_rate == 0.006


def test_names_stay_when_a_sweep_grows():
    before = sweep_members(config_of(weights=(1.0,)))
    after = sweep_members(config_of(weights=(1.0, 3.0), data_seeds=(0, 1), temperatures=(1.0, 4.0)))
    for name, member in before.items():
        same, other = after[name].to_dict(), member.to_dict()
        for config in (same, other):
            del config["sweep"]
        assert same == other


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"weights": (1.0, 1)}, "sweep.weights=(1.0, 1) names a value twice"),
        ({"data_seeds": (2, 2)}, "names a value twice"),
        ({"temperatures": (0.0,)}, "sweep.temperatures holds 0.0; give finite numbers greater"),
        ({"losses": ("hinge",)}, "sweep.losses"),
        ({"data_seeds": (-1,)}, "at least 0"),
        ({"group_size": -1}, "sweep.group_size=-1 must not be negative"),
    ],
)
def test_bad_axes_are_one_line(sweep, message):
    with pytest.raises(UserError) as caught:
        settings.validate(config_of(**sweep))
    assert message in str(caught.value)
