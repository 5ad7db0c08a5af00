import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from kd_ranker import commands, runs, teachers
from kd_ranker.data import loader
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.training import checkpoints, recipes
from tests import small

# As many steps as elsewhere: the schedule is compiled in, and what is compiled is shared.
SWEEP = {"sweep__modes": ("none", "aux"), "sweep__seeds": (0, 1), "train__eval_every": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.open_world(tmp_path_factory)


@pytest.fixture(scope="module")
def trained(world):
    """mode, teacher.source -> the workdir of a student; a test changes only a copy of it."""

    def workdir(mode, source="live"):
        config = world.config(distill__mode=mode, teacher__source=source)
        return world.made(f"{mode}-{source}", lambda folder: commands.train(config, folder))

    return workdir


def table(workdir):
    return results.read_csv(workdir / results.FILE)


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def student_parameters(config, workdir):
    dataset = teachers.open_dataset(config)
    _, state = recipes.student_start(config, dataset.spec, None)
    with checkpoints.open_manager(workdir) as manager:
        state, step = checkpoints.restore(manager, state, None)
    assert step == config.train.steps
    return state.parameters


@pytest.mark.parametrize("mode", MODES)
def test_train_leaves_what_the_contract_says(world, trained, mode):
    workdir = trained(mode)
    config = world.config(distill__mode=mode)
    frame = table(workdir)
    assert list(frame.columns) == results.columns(config.tasks, config.funnel.report_at)
    assert frame["serve"].tolist() == list(MODES[mode].serve)
    assert set(frame["mode"]) == {mode}
    assert set(frame["role"]) == {"student"}
    assert set(frame["step"]) == {config.train.steps}
    assert frame["user_bce/watch"].between(0, 2).all()
    assert frame["cost_ratio"].between(0, 0.1).all()
    distilled = mode != "none"
    assert frame["distill_loss"].notna().all() == distilled
    assert set(frame["distill_weight"]) == {1.0 if distilled else 0.0}

    assert json.loads((workdir / "config.json").read_text()) == json.loads(config.to_json())
    assert (workdir / "checkpoints" / "20").is_dir()
    assert list(workdir.glob("events.out.tfevents.*"))
    lines = metrics(workdir)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if "eval/user_bce/watch" in line] == [10]


def test_a_finished_run_is_left_as_it_is(world, trained, tmp_path):
    workdir = tmp_path / "finished"
    shutil.copytree(trained("shared"), workdir)
    before = {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    }
    commands.train(world.config(distill__mode="shared"), workdir)
    assert {path: path.read_bytes() for path in before} == before


def log_teacher(world):
    """Two workers that write the same dataset at once would be in each other's way."""
    with world.locked("log_teacher"):
        return commands.log_teacher(world.config())


@pytest.mark.parametrize("mode", ["aux", "shared"])
def test_a_logged_teacher_gives_the_student_of_the_live_one(world, trained, mode):
    log_teacher(world)
    live, logged = trained(mode), trained(mode, "logged")
    config = world.config(distill__mode=mode)
    one, other = student_parameters(config, live), student_parameters(config, logged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)
    start = recipes.student_model(config, teachers.open_dataset(config).spec)[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), one, start)
    assert max(jax.tree.leaves(moved)) > 0.02
    one, other = (table(workdir).select_dtypes("number") for workdir in (live, logged))
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_logged_records_carry_the_teachers_version_and_no_other_counts(world):
    config = world.config()
    directory = log_teacher(world)
    version = teachers.load_teacher(config, teachers.open_dataset(config)).version
    assert f"-teacher-{version}" in directory.parent.name
    dataset = teachers.open_dataset(config, version)
    assert dataset.spec.teacher_version == version
    for split in ("train", "test"):
        requests = list(loader.read_requests(dataset, split))
        assert {request.teacher_version for request in requests} == {version}
        # teacher.stage=retrieved: every candidate was scored.
        assert all(len(r.teacher_probability) == len(r.item_id) for r in requests)

    def weights(of):
        sizes = dict(requests=8, candidates=32, passed_share=0.5, negative_rate=1.0, seed=0)
        return np.asarray(next(iter(loader.training_batches(of, **sizes))).teacher_weight)

    other = dataclasses.replace(dataset.spec, teacher_version="of-another-teacher")
    assert (weights(dataset) == 1).all()
    assert (weights(dataclasses.replace(dataset, spec=other)) == 0).all()


@pytest.fixture(scope="module")
def swept(world):
    return world.made("swept", lambda folder: commands.sweep(world.config(**SWEEP), folder))


def test_a_sweep_has_one_row_a_model_and_serve_choice(world, swept):
    frame = table(swept)
    config = world.config()
    assert list(frame.columns) == results.columns(config.tasks, config.funnel.report_at)
    assert frame["role"].tolist() == ["teacher"] + ["student"] * 8
    assert frame["step"][0] == config.teacher.train.steps
    students = frame[1:]
    expected = [
        (mode, serve, seed)
        for seed in (0, 1)
        for mode in ("none", "aux")
        for serve in MODES[mode].serve
    ]
    assert list(students[["mode", "serve", "seed"]].itertuples(index=False, name=None)) == expected
    assert (students.loc[students["mode"] == "none", "funnel_cost_saving"] == 0).all()
    assert students["funnel_cost_saving"].notna().all()
    cost = (
        config.funnel.retrieved * frame["flops_per_candidate"]
        + frame["passed_for_99"] * frame["flops_per_candidate"][0]
    )
    for _, of_seed in students.groupby("seed"):
        saving = 1 - cost[of_seed.index] / cost[of_seed.index[0]]
        np.testing.assert_allclose(of_seed["funnel_cost_saving"], saving, atol=1e-5)


def test_a_sweep_without_a_teacher_to_run_knows_neither_its_seed_nor_its_step(world, tmp_path):
    config = world.config(**SWEEP, teacher__source="logged", teacher__workdir="")
    config.update(sweep={"modes": ("none",), "seeds": (0,)})
    commands.sweep(config, tmp_path)
    rows = (tmp_path / results.FILE).read_text().splitlines()[1:]
    assert rows[0].startswith("cascade,teacher,,,,user,,,")
    assert rows[1].startswith("cascade,student,none,,0,user,0,20,")


def test_the_members_of_a_sweep(world):
    config = world.config(sweep__weights=(0.5, 2.0), sweep__seeds=(0, 7))
    members = commands.sweep_members(config)
    assert list(members) == [
        f"{member}-seed{seed}"
        for seed in (0, 7)
        for member in (
            "none-weight0", "aux-weight0.5", "aux-weight2", "shared-weight0.5", "shared-weight2",
        )
    ]  # fmt: skip
    member = members["aux-weight2-seed7"]
    assert (member.distill.mode, member.distill.weight, member.seed) == ("aux", 2.0, 7)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_member_it_was_at(world, swept, tmp_path):
    workdir = tmp_path / "killed"
    flags = world.flags(workdir, **SWEEP)
    small.run_and_kill("experiments.sweep", "logging", "aux-weight1-seed0", 15, flags)
    assert not (workdir / results.FILE).exists()
    finished = workdir / "members" / "none-weight0-seed0" / "checkpoints" / "20"
    before = finished.stat().st_mtime_ns
    commands.sweep(world.config(**SWEEP), workdir)
    assert finished.stat().st_mtime_ns == before
    assert (workdir / results.FILE).read_bytes() == (swept / results.FILE).read_bytes()


@pytest.mark.parametrize("damaged", [(20,), (10, 20)], ids=["newest", "all"])
def test_a_run_with_damaged_checkpoints_ends_with_the_same_results(
    world, trained, tmp_path, damaged
):
    whole, workdir = trained("shared"), tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    (workdir / results.FILE).unlink()
    for step in damaged:
        for file in (workdir / "checkpoints" / str(step) / "state").rglob("d/*"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)
    commands.train(world.config(distill__mode="shared"), workdir)
    for name in (results.FILE, "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    set_aside = {int(path.name) for path in (workdir / "damaged_checkpoints").iterdir()}
    assert set_aside == set(damaged)


def fault_of(command, *arguments):
    with pytest.raises(UserError) as caught:
        command(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("command", ["train_teacher", "train", "sweep", "log_teacher"])
def test_without_a_dataset_each_command_names_the_one_that_makes_it(world, tmp_path, command):
    workdir = tmp_path / "workdir"
    arguments = () if command == "log_teacher" else (workdir,)
    config = world.config(data__dir=str(tmp_path / "nowhere"))
    fault = fault_of(getattr(commands, command), config, *arguments)
    assert str(tmp_path / "nowhere") in fault
    assert "python -m experiments.prepare_data" in fault
    assert not workdir.exists()


@pytest.mark.parametrize("command", [commands.train, commands.sweep])
@pytest.mark.parametrize("source", ["live", "logged"])
def test_without_a_teacher_a_student_names_the_command_that_makes_it(
    world, tmp_path, command, source
):
    config = world.config(teacher__workdir=str(tmp_path / "nobody"), teacher__source=source)
    fault = fault_of(command, config, tmp_path / "workdir")
    assert fault.startswith(f"no teacher at {tmp_path / 'nobody'}")
    assert "python -m experiments.train_teacher" in fault


def test_an_empty_teacher_workdir_is_named(world, tmp_path):
    fault = fault_of(commands.train, world.config(teacher__workdir=""), tmp_path)
    assert "teacher.workdir is empty" in fault
    assert "python -m experiments.train_teacher" in fault


def test_an_unfinished_teacher_says_how_far_it_is(world, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(world.teacher, teacher)
    shutil.rmtree(teacher / "checkpoints" / "20")
    fault = fault_of(commands.train, world.config(teacher__workdir=str(teacher)), tmp_path / "w")
    assert "stopped at step 10 of 20; finish it with: python -m experiments.train_teacher" in fault


def test_a_student_is_no_teacher_and_keeps_its_checkpoints(world, trained, tmp_path):
    workdir = trained("none")
    config = world.config(teacher__workdir=str(workdir))
    assert "holds a model of other sizes" in fault_of(commands.train, config, tmp_path / "w")
    assert (workdir / "checkpoints" / "20").is_dir()
    assert not (workdir / "damaged_checkpoints").exists()


def test_a_teacher_of_other_tasks_is_named_with_its_tasks(world, tmp_path):
    config = world.config(tasks=("watch",), value_weights=(1.0,))
    commands.prepare_data(config)
    fault = fault_of(commands.train, config, tmp_path / "w")
    assert re.search("trained on .* for watch, like, share, not on .* for watch;", fault)


def test_a_dataset_that_the_teacher_has_not_scored_names_the_command(world, tmp_path, monkeypatch):
    version = "another"
    load = teachers.load_teacher
    monkeypatch.setattr(
        teachers, "load_teacher", lambda *arguments: load(*arguments)._replace(version=version)
    )
    fault = fault_of(commands.train, world.config(teacher__source="logged"), tmp_path / "w")
    assert "teacher-another" in fault
    assert "python -m experiments.log_teacher" in fault


def test_a_workdir_of_another_config_names_the_keys_that_differ(world, trained):
    workdir = trained("shared")
    before = (workdir / results.FILE).read_bytes()
    config = world.config(distill__mode="shared", distill__weight=3.0, seed=4)
    fault = fault_of(commands.train, config, workdir)
    assert "distill.weight (1.0 there, 3.0 now), seed (0 there, 4 now)" in fault
    assert (workdir / results.FILE).read_bytes() == before


def test_data_that_is_there_is_left_alone(world):
    directory = commands.prepare_data(world.config())
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert commands.prepare_data(world.config()) == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_costs_are_those_of_the_teacher_that_was_trained(world):
    """Not of one that the student's own flags would describe."""
    config = world.config(teacher__width=64)
    dataset = teachers.open_dataset(config)
    teacher = teachers.load_teacher(config, dataset)
    flops = runs.teacher_flops(config, dataset.spec, teacher)
    assert flops == runs.teacher_flops(world.config(), dataset.spec, None)
    assert flops != runs.teacher_flops(config, dataset.spec, None)


def test_copies_scored_at_different_stages_are_different_datasets(world):
    names = [
        teachers.dataset_name(world.config(teacher__stage=stage), "version")
        for stage in ("passed", "retrieved")
    ]
    assert names[0] != names[1]


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_a_run_on_several_devices_evaluates_on_its_way(world, trained, tmp_path, mapping):
    """The results are those of one device, up to rounding."""
    config = world.config(parallel__devices=4, parallel__mapping=mapping, train__eval_every=5)
    commands.train(config, tmp_path)
    assert any("eval/passed_for_99" in line for line in metrics(tmp_path))
    single = table(trained("shared"))
    for column in ("user_bce/watch", "teacher_kl/watch", "alignment_ratio"):
        np.testing.assert_allclose(table(tmp_path)[column], single[column], rtol=1e-3)


def test_a_state_that_is_not_finite_is_never_saved(world, tmp_path):
    config = world.config(
        optimizer__learning_rate=1e30, train__log_every=1000, train__checkpoint_every=4
    )
    with pytest.raises(UserError, match=r"the loss is nan at step \d+; try a smaller"):
        commands.train(config, tmp_path)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_the_funnels_own_k_is_always_reported(world):
    config = world.config(funnel__report_at=(10,))
    assert runs._report_at(config) == [10, config.funnel.passed]


def test_a_split_without_requests_is_one_line(world, tmp_path):
    config = world.config(data__test_requests=0, data__dir=str(tmp_path))
    with pytest.raises(UserError, match="no requests for its split 'test'"):
        commands.prepare_data(config)
