"""First configs of logs with names that no list has: few edits, and no fault without a CHECK."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

import kd_ranker as kd
from kd_ranker.config import schema
from kd_ranker.distillation.losses import LOSSES
from kd_ranker.distillation.teacher_signal import SCORES
from kd_ranker.distillation.terms import parse_terms
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.infer import by_structure, funnel, sample
from tests.sources import owner_logs
from tests.sources.logs.test_infer import (
    check_of,
    features_of,
    infer,
    is_checked,
    left_out,
    roles_of,
)

# Log -> what its owner has to change: keys, or "sizes" of the funnel.
EDITS = {
    "french": {},
    "polish": {},
    "english": {"data.columns.user"},
    "german": {"data.columns.position", "data.labels.gelesen", "data.teacher.gelesen"},
    "swedish": {"data.stages", "data.teacher.spelad", "sizes"},
    "terse": {},
    "italian": {},
}


def found_roles(config: ConfigDict) -> dict[str, Any]:
    """The roles of a config, with its tasks called as their labels."""
    names = dict(config.data.labels)
    found = {}
    for key, column in roles_of(config).items():
        section, _, name = key.rpartition(".")
        is_of_task = section in ("data.labels", "data.teacher")
        found[f"{section}.{names[name]}" if is_of_task else key] = column
    for key, default in (("time_unit", "s"), ("time_format", "")):
        if config.data[key] != default:
            found[f"data.{key}"] = config.data[key]
    return found


def edits_of(config: ConfigDict, owner: owner_logs.OwnerLog) -> set[str]:
    """The keys that an owner has to change; all stages, and all sizes, are on one line."""
    found = found_roles(config)
    different = {
        key for key in found.keys() | owner.roles if found.get(key) != owner.roles.get(key)
    }
    edits = {"data.stages" if key.startswith("data.stages.") else key for key in different}
    sizes = (config.funnel.retrieved, config.funnel.passed, config.funnel.shown)
    return edits | ({"sizes"} if sizes != owner.sizes else set())


@pytest.fixture(scope="module", params=owner_logs.OWNERS)
def owner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a log, what it is, and its first config."""
    log = owner_logs.OWNERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, log, *infer(folder, log.write(folder))


def test_few_edits_and_none_without_a_check(owner):
    name, log, text, config = owner
    edits = edits_of(config, log)
    assert edits == set(EDITS[name])
    assert len(edits) <= 3
    for key, column in found_roles(config).items():
        if log.roles.get(key) != column:
            assert is_checked(text, key), key
    assert len(text.splitlines()) <= 60


def test_a_sweep_compares_methods_that_the_log_can_teach(owner):
    _, log, text, config = owner
    modes = {run["distill.mode"] for run in config.sweep.runs}
    losses = {run.get("distill.loss", "") for run in config.sweep.runs}
    assert modes == {"none", "aux", "shared"}
    only_shown = log.sizes[0] == log.sizes[2]
    assert any(":stage" in loss for loss in losses) != only_shown
    assert ("stages=False" in text) == only_shown


def test_no_outcome_is_a_feature(owner):
    _, log, _, config = owner
    found = {column: of for column, (of, _) in features_of(config).items()}
    expected = {column: of for column, of in log.features.items() if column != "tenure"}
    assert found == expected


def test_a_dataset_builds_from_the_edited_config(owner, tmp_path):
    _, log, _, config = owner
    config = ConfigDict(config)  # unlocked
    config.data.stages, config.data.labels, config.data.teacher = {}, {}, {}
    for key, value in log.roles.items():
        section, _, name = key.rpartition(".")
        schema.value_of(config, section)[name] = value
    config.tasks = tuple(config.data.labels)
    config.value_weights = tuple(float(task in config.data.teacher) for task in config.tasks)
    config.teacher.source = "logged"
    retrieved, passed, shown = log.sizes
    config.funnel.update(retrieved=retrieved, passed=passed, shown=shown, report_at=(shown,))
    config.data.dir, config.data.allow = str(tmp_path), ("few_positives", "one_candidate")
    prepared = kd.prepare(config)
    assert (prepared.directory / "data_report.json").exists()


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return read_english(tmp_path_factory.mktemp("english"))


def read_english(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(owner_logs.english_folder(folder))


def test_sizes_are_those_of_whole_requests(english, tmp_path, monkeypatch):
    """A sample of rows in any order has a part of each request."""
    monkeypatch.setattr(sample, "_MOST_ROWS", 4_000)
    _, config = infer(tmp_path / "all", english)
    funnel_sizes = (config.funnel.retrieved, config.funnel.passed, config.funnel.shown)
    assert funnel_sizes == owner_logs.SIZES
    monkeypatch.setattr(funnel, "MOST_ROWS", 5_000)
    text, config = infer(tmp_path / "sample", english)
    assert config.funnel.retrieved < owner_logs.CANDIDATES
    doubt = "counted in a sample of 4,001 rows; is no request larger?"
    assert check_of(text, "config.funnel.retrieved") == doubt


def test_columns_that_fit_equally_are_named(english, tmp_path):
    table = english.assign(also="x" + english["page_load"], twin=english["thing"].astype(str))
    text, config = infer(tmp_path, table)
    assert config.data.columns.request == ""
    rivals = "which column has the request: 'page_load' or 'also'?"
    assert check_of(text, "data.columns.request").startswith(rivals)
    # Without the request, nothing is known to be of the candidate, of the user or of the item.
    assert not features_of(config)
    table = english.assign(twin="x" + english["thing"].astype(str))
    text, config = infer(tmp_path / "item", table)
    assert config.data.columns.item == ""
    assert check_of(text, "data.columns.item") == "which column has the item: 'thing' or 'twin'?"


def test_an_early_score_is_a_feature_by_its_name_if_the_request_is_known(english, tmp_path):
    rng = np.random.default_rng(0)
    table = english.assign(
        early_affinity=rng.random(len(english)), affinity=rng.random(len(english))
    )
    _, config = infer(tmp_path, table)
    assert features_of(config)["early_affinity"] == ("candidate", "dense")
    assert "affinity" not in features_of(config)
    rivals = table.assign(also="x" + table["page_load"])
    text, config = infer(tmp_path / "open", rivals)
    assert "early_affinity" not in features_of(config)
    assert left_out(text)["early_affinity"] == "owner unknown"


def test_a_column_of_few_repeated_items_is_not_surely_theirs(english, tmp_path):
    """Where hardly an item comes twice, each column may be constant within items by chance."""
    rare = english.reset_index(drop=True).assign(thing=np.arange(len(english)))
    for column in ("thing", "heft", "offer", "gaze"):
        rare.loc[8:15, column] = rare.loc[:7, column].to_numpy()
    text, config = infer(tmp_path, rare, {"data.columns.item": "thing"})
    assert not [name for name, (of, _) in features_of(config).items() if of == "item"]
    assert {"heft", "offer", "gaze"} <= left_out(text).keys()


def test_seconds_are_no_positions(english, tmp_path):
    """They differ within a request as well, but exceed the number of its candidates."""
    seconds = english.groupby("page_load")["gaze"].rank()
    _, config = infer(tmp_path / "places", english.assign(gaze=seconds))
    assert config.data.columns.position == "gaze"
    text, config = infer(tmp_path, english.assign(gaze=1 + 20 * (seconds - 1)))
    assert config.data.columns.position == ""
    assert left_out(text)["gaze"] == "missing where a candidate was not shown"


@pytest.fixture(scope="module")
def terse(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The log of lists, a row per candidate."""
    table = pd.read_parquet(owner_logs.terse_lists(tmp_path_factory.mktemp("terse")))
    lists = [name for name in table if isinstance(table[name][0], np.ndarray)]
    return table.explode(lists, ignore_index=True).infer_objects()


def test_a_position_of_minus_one_is_none(terse, tmp_path):
    """Also without a stage, where a candidate with a position was shown."""
    of_shown = terse.assign(lk=terse["lk"].where(terse["slot"] >= 0)).drop(columns="stg")
    text, config = infer(tmp_path, of_shown)
    assert config.data.columns.position == "slot"
    assert config.funnel.shown == owner_logs.SHOWN
    below = terse.assign(slot=terse["slot"] - 1)  # -2 is no position
    text, config = infer(tmp_path / "below", below)
    assert config.data.columns.position == ""
    assert "slot" in left_out(text)


def test_positions_tell_who_was_shown(terse, tmp_path):
    """Labels that are 0 where not shown, and no stages, do not."""
    _, config = infer(tmp_path, terse.drop(columns="stg"))
    assert config.data.columns.position == "slot"
    assert config.data.labels.lk == "lk"


def test_positions_may_be_texts(terse, tmp_path):
    places = terse["slot"].where(terse["slot"] >= 0).astype("Int64").astype("string")
    table = terse.assign(slot=places.fillna("none")).drop(columns=["stg", "lk"])
    _, config = infer(tmp_path, table, {"data.columns.position": "slot"})
    assert config.data.columns.position == "slot"


def test_the_early_ranker_s_score_orders_who_was_passed(terse, tmp_path):
    text, config = infer(tmp_path, terse)
    assert config.data.columns.incumbent == "lr_s"
    doubt = "by its values; is it the score of today's early ranker?"
    assert check_of(text, "data.columns.incumbent") == doubt
    _, config = infer(tmp_path / "smallest_first", terse.assign(lr_s=-terse["lr_s"]))
    assert config.data.columns.incumbent == ""
    noise = np.random.default_rng(0).normal(size=len(terse))
    _, config = infer(tmp_path / "noise", terse.assign(lr_s=noise))
    assert config.data.columns.incumbent == ""
    text, config = infer(tmp_path / "two", terse.assign(twin=2 * terse["lr_s"]))
    assert config.data.columns.incumbent == "?"
    doubt = "which column has the score of today's early ranker: 'lr_s' or 'twin'?"
    assert check_of(text, "data.columns.incumbent") == doubt


def losses_on_scores(config: ConfigDict) -> set[str]:
    """The losses of a sweep that learn from the teacher's scores."""
    texts = [run["distill.loss"] for run in config.sweep.runs if "distill.loss" in run]
    terms = itertools.chain(*map(parse_terms, texts))
    return {term.loss for term in terms if term.signal == SCORES}


def test_scores_beyond_probabilities_are_a_signal_of_their_own(terse, tmp_path):
    text, config = infer(tmp_path, terse)
    assert config.data.teacher_signal == "score"
    doubt = "'hr_s' leaves [0, 1]; does it hold scores, higher first?"
    assert check_of(text, "data.teacher_signal") == doubt
    losses = losses_on_scores(config)
    assert config.distill.loss in losses
    probability = 1 / (1 + np.exp(-terse["hr_s"]))
    text, config = infer(tmp_path / "probability", terse.assign(hr_s=probability))
    assert config.data.teacher_signal == "probability"
    assert "teacher_signal" not in text
    of_order = {loss for loss in losses_on_scores(config) if not LOSSES[loss].needs_probabilities}
    assert of_order < losses_on_scores(config)
    assert losses == of_order


def test_whole_numbers_from_one_are_positions_of_a_teacher(terse, tmp_path):
    ranks = terse.groupby("qid")["hr_s"].rank(ascending=False, method="first").astype("Int64")
    named = {"data.teacher": {"lk": "hr_s"}}
    text, config = infer(tmp_path, terse.assign(hr_s=ranks), named)
    assert config.data.teacher_signal == "rank"
    doubt = "'hr_s' leaves [0, 1]; does it hold positions, smallest first?"
    assert check_of(text, "data.teacher_signal") == doubt


@pytest.fixture(scope="module")
def italian(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("italian")
    owner_logs.italian_json(folder)
    return pd.concat(pd.read_json(file, lines=True) for file in sorted(folder.iterdir()))


def test_a_day_that_may_be_a_month_has_a_check(italian, tmp_path):
    text, config = infer(tmp_path, italian)
    assert config.data.time_format == "%d/%m/%Y %H:%M:%S"
    doubt = "or '%m/%d/%Y %H:%M:%S', which fits as well?"
    assert check_of(text, "data.time_format") == doubt
    later = italian.assign(quando=italian["quando"].str.replace("/03/", "/13/"))
    text, config = infer(tmp_path / "later", later)
    assert config.data.time_format == "%m/%d/%Y %H:%M:%S"
    assert not is_checked(text, "data.time_format")


def test_a_time_may_have_any_format_that_the_user_names(italian, tmp_path):
    years_first = italian["quando"].str.replace(r"(\d+)/(\d+)/(\d+)", r"\3, \2, \1", regex=True)
    table = italian.assign(quando=years_first)
    text, config = infer(tmp_path, table)
    assert config.data.columns.time == ""
    assert config.data.columns.user == "?"
    doubt = "which column has the user: 'cod_ric' or 'cod_cand'?"
    assert check_of(text, "data.columns.user").startswith(doubt)
    named = {"data.time_format": "%Y, %m, %d %H:%M:%S"}
    _, config = infer(tmp_path / "named", table, named)
    assert config.data.columns.time == "quando"
    assert config.data.columns.user == "cod_cand"


def test_a_column_that_changes_with_time_may_be_the_teacher_s_version(italian, tmp_path):
    text, config = infer(tmp_path, italian)
    doubt = "by its values; is it the version of the final ranker?"
    assert check_of(text, "data.columns.teacher_version") == doubt
    # The test has only the later one.
    assert config.data.teacher_version == ""
    doubt = "all versions count; or only the last one, 'mf-3.2'?"
    assert check_of(text, "data.teacher_version") == doubt
    # One that comes back is none.
    hours = italian["quando"].str.slice(11, 13).astype(int)
    table = italian.drop(columns="ver_mod").assign(part=np.where(hours < 12, "early", "late"))
    _, config = infer(tmp_path / "back", table)
    assert config.data.columns.teacher_version == ""
    assert features_of(config)["part"][0] == "context"
    table = italian.assign(also=italian["ver_mod"] + "b")
    text, config = infer(tmp_path / "two", table)
    assert config.data.columns.teacher_version == "?"
    assert not {"also", "ver_mod"} & {*features_of(config)}


def test_numbers_may_have_a_decimal_comma(italian, tmp_path):
    file = tmp_path / "log.csv"
    italian.to_csv(file, index=False, sep=";", decimal=",")
    _, config = infer(tmp_path, str(file), {"data.path": str(file)})  # as the command names it
    assert config.data.path == ""
    assert "decimal_separator = ','" in config.data.sql
    assert config.data.teacher.aperto == "pb_fin"
    assert config.data.columns.incumbent == "nota_pre"
    # Missing values are written, too, by one program or by several.
    other = italian.assign(altro=np.where(np.arange(len(italian)) % 2, "NULL", "5"))
    other.to_csv(file, index=False, sep=";", na_rep="\\N")
    _, config = infer(tmp_path / "missing", str(file))
    assert r"nullstr = ['', 'NULL', '\N']" in config.data.sql
    assert config.data.teacher.aperto == "pb_fin"
    # A list of ids in a text is no number.
    listed = italian.assign(also=[f"{number},{number + 1}" for number in range(len(italian))])
    listed.loc[0, "also"] = "1,2,3"
    listed.to_csv(file, index=False, sep=";")
    _, config = infer(tmp_path / "listed", str(file))
    assert (config.data.path, config.data.sql) == (str(file), "")


def test_a_select_gets_a_first_config(italian, tmp_path):
    italian.to_parquet(tmp_path / "log.parquet")
    named = {"data.sql": f"SELECT * EXCLUDE (citta_off) FROM '{tmp_path}/log.parquet';"}
    _, config = infer(tmp_path, "", named)
    assert (config.data.path, config.data.sql) == ("", named["data.sql"])
    assert config.data.columns.request == "cod_ric"
    assert "citta_off" not in features_of(config)


def test_raw_scores_of_two_tasks_go_to_the_labels_that_they_predict(english, tmp_path):
    # Scores have an origin of their own.
    logits = {name: 100 + np.log(english[name] / (1 - english[name])) for name in ("m_a", "m_b")}
    _, config = infer(tmp_path, english.assign(**logits))
    found = {config.data.labels[task]: column for task, column in config.data.teacher.items()}
    assert found == {"opened": "m_a", "saved": "m_b"}


def test_the_other_of_two_stages_is_asked_for(tmp_path):
    text, config = infer(tmp_path, owner_logs.swedish_json(tmp_path))
    assert config.data.stages.to_dict() == {"shown": "True", "retrieved": "False"}
    assert check_of(text, "data.stages") == "is 'False' retrieved, or passed?"


def test_those_in_a_cart_are_not_all_that_were_shown(terse, tmp_path):
    """All that is bought was in a cart, and the time of that is known for just these."""
    in_cart = terse["lk"] == 1
    bought = in_cart & (terse["wt_s"] > terse["wt_s"][in_cart].median())
    table = terse.drop(columns="stg").assign(
        bought=bought.astype(int), added=np.where(in_cart, terse["wt_s"], np.nan)
    )
    _, config = infer(tmp_path, table)
    assert config.data.columns.position == "slot"
    assert {*config.data.labels.values()} == {"lk", "bought"}


def test_what_served_the_request_is_no_feature(italian, tmp_path):
    request, user = (pd.factorize(italian[name])[0] for name in ("cod_ric", "cod_cand"))
    table = italian.assign(
        rank_ms=10 + request % 37,
        host=np.array(["a-01", "b-02", "c-03"])[request % 3],
        exp_arm=np.array(["control", "new"])[user % 2],
        app_model=np.array(["x1", "x2", "x3"])[user % 3],
    )
    text, config = infer(tmp_path, table)
    reasons = left_out(text)
    assert reasons["rank_ms"] == reasons["host"] == "of what served the request, by its name"
    assert reasons["exp_arm"] == "of an experiment, by its name"
    assert features_of(config)["app_model"] == ("user", "category")


def test_what_a_label_sets_says_so(italian, tmp_path):
    is_open = italian["aperto"] == 1
    bought = is_open & (italian["sec_lett"] > italian["sec_lett"][is_open].quantile(0.8))
    shown = italian["aperto"].notna()
    has_order = bought.groupby(italian["cod_ric"]).transform("any")
    order = np.where(has_order, pd.factorize(italian["cod_ric"])[0] * 0.5, np.nan)
    table = italian.assign(
        comprato=bought.astype(float).where(shown),
        worth=italian["paga"].where(bought, 0.0),
        paid=order,
    )
    text, config = infer(tmp_path, table)
    assert {*config.data.labels.values()} == {"aperto", "comprato"}
    assert left_out(text)["worth"] == "known, or not 0, only where 'comprato' is 1"
    assert left_out(text)["paid"] == "missing for requests without a 1 of 'comprato'"
    assert not {"worth", "paid"} & {*features_of(config)}


def test_what_was_written_of_a_request_after_its_ranking_is_no_feature(italian, tmp_path):
    request = pd.factorize(italian["cod_ric"])[0]
    opened = italian["aperto"].fillna(0).groupby(request).transform("sum")
    noise = np.random.default_rng(0).integers(0, 2, size=len(italian))
    has_failed = request % 20 == 0
    table = italian.assign(
        pb_fin=italian["pb_fin"].mask(has_failed),
        n_open=opened + (request % 5 == 0),
        failed=np.where(has_failed, "S", "N"),
        other=np.where(request % 3 == 0, "S", "N"),
        trace=[f"t{number:05d}" for number in request],
        coin=noise,
    )
    text, config = infer(tmp_path, table, {"data.columns.request": "cod_ric"})
    reasons = left_out(text)
    assert reasons["n_open"] == "goes with the number of 1 of 'aperto' in the request"
    assert reasons["failed"] == "tells whether the final ranker scored the request"
    assert reasons["trace"] == "an id or a text"
    assert features_of(config)["other"] == ("context", "category")


def test_a_session_of_one_request_is_not_the_request(italian, tmp_path):
    table = italian.assign(cod_sess="s" + italian["cod_ric"])
    _, config = infer(tmp_path, table)
    assert config.data.columns.request == "cod_ric"
    assert "cod_sess" not in features_of(config)


def test_the_number_of_an_order_is_no_user(italian, tmp_path):
    request = pd.factorize(italian["cod_ric"])[0]
    has_order = request % 4 > 0
    table = italian.assign(ordine=np.where(has_order, 70_000 + request, np.nan))
    table["pagato"] = np.where(has_order, request % 7, np.nan)
    _, config = infer(tmp_path, table)
    assert config.data.columns.user == "cod_cand"


def test_users_of_one_request_each_are_a_question(italian, tmp_path):
    request = pd.factorize(italian["cod_ric"])[0]
    new = np.where(request % 20 == 0, request // 20 % 2, request)
    table = italian.assign(cod_cand=[f"c{number}" for number in new])
    text, config = infer(tmp_path, table.drop(columns="settore"))
    assert config.data.columns.user == "?"
    assert "which column has the user: 'cod_cand'" in check_of(text, "data.columns.user")


def test_a_user_owns_more_than_the_item_of_a_page(italian, tmp_path):
    """Guests have no id, and half of the pages show one item next to its own columns."""
    request = pd.factorize(italian["cod_ric"])[0]
    user = pd.factorize(italian["cod_cand"])[0]
    page = request % 97
    table = italian.assign(
        cod_cand=italian["cod_cand"].mask(request % 9 == 0),
        pagina=9_000 + page, pagina_tipo=np.array(["a", "b", "c"])[page % 3],
        eta=user % 40, citta=np.array(["r", "m"])[user % 2], piano=np.array(["x", "y"])[user % 2],
    )  # fmt: skip
    text, config = infer(tmp_path, table)
    assert config.data.columns.user == "cod_cand"
    assert is_checked(text, "data.columns.user")


def test_dates_as_numbers_are_no_feature(italian, tmp_path):
    days = pd.to_datetime(italian["quando"], dayfirst=True).dt.strftime("%Y%m%d").astype(int)
    text, _ = infer(tmp_path, italian.assign(giorno=days))
    assert left_out(text)["giorno"] == "a date or a time, and no number"


def test_a_user_of_many_requests_may_be_nobody(italian, tmp_path):
    is_guest = pd.factorize(italian["cod_ric"])[0] % 10 < 3
    table = italian.assign(
        cod_cand=italian["cod_cand"].mask(is_guest, "-1"), settore=italian["settore"].mask(is_guest)
    )
    text, config = infer(tmp_path, table)
    assert config.data.columns.user == "cod_cand"
    doubt = "by its values; is it the user? '-1' has 30% of the requests; is it nobody?"
    assert check_of(text, "data.columns.user") == doubt


def test_scores_called_after_labels_are_theirs_next_to_a_blend(english, tmp_path):
    names = {"m_a": "hr_pOpened", "m_b": "hr_pSaved"}
    table = english.rename(columns=names).assign(hr_sum=(english["m_a"] + english["m_b"]) / 2)
    text, config = infer(tmp_path, table)
    found = {config.data.labels[task]: column for task, column in config.data.teacher.items()}
    assert found == {"opened": "hr_pOpened", "saved": "hr_pSaved"}
    assert is_checked(text, "data.teacher.opened")
    table = table.rename(columns={"hr_pSaved": "hr_x"})
    _, config = infer(tmp_path / "one", table)
    assert {*config.data.teacher.values()} == {"hr_pOpened"}
    assert dict(zip(config.tasks, config.value_weights, strict=True)) == {"opened": 1, "saved": 0}


def test_a_word_of_a_role_decides_between_columns_that_fit(english, tmp_path):
    table = english.rename(columns={"page_load": "no_req"}).assign(also="x" + english["page_load"])
    text, config = infer(tmp_path, table)
    assert config.data.columns.request == "no_req"
    assert is_checked(text, "data.columns.request")


def test_stages_in_words_of_their_own_are_asked_for(italian, tmp_path):
    stage = np.where(italian["pb_fin"].notna(), "PASS", "OUT")
    named = {"data.columns.stage": "fase"}
    text, config = infer(tmp_path, italian.assign(fase=stage), named)
    assert config.data.stages.shown == ""
    assert "which text has a shown candidate?" in check_of(text, "data.stages")


def test_a_stage_may_have_several_texts(italian, tmp_path):
    shown, passed = italian["pos_scherm"].notna(), italian["pb_fin"].notna()
    rows = np.arange(len(italian))
    late = np.where(rows % 9 == 0, "LATE", "PASS")
    stage = np.where(shown, "SEEN", np.where(passed, late, "CUT"))
    text, config = infer(tmp_path, italian.assign(fase=stage))
    assert config.data.columns.stage == "fase"
    texts = config.data.stages.to_dict()
    assert {name: {*of.split(", ")} for name, of in texts.items()} == {
        "shown": {"SEEN"}, "passed": {"PASS", "LATE"}, "retrieved": {"CUT"},
    }  # fmt: skip
    assert "are all of these passed: " in check_of(text, "data.stages")
    assert config.funnel.passed == owner_logs.SIZES[1]
    # A text that is another's, too, is no stage.
    _, config = infer(tmp_path / "other", italian.assign(fase=np.where(rows % 9, "SEEN", "CUT")))
    assert config.data.columns.stage == ""


def test_a_teacher_that_is_open_leaves_its_version_no_feature(italian, tmp_path):
    text, config = infer(tmp_path, italian.drop(columns="pb_fin"))
    assert not config.data.teacher
    assert is_checked(text, "data.columns.teacher_version")
    assert "ver_mod" not in features_of(config)


def test_labels_of_all_candidates_need_a_stage(english, tmp_path):
    """Without stages, a label says who was shown."""
    table = english.drop(columns="lvl")
    text, config = infer(tmp_path, table)
    assert config.data.labels.to_dict() == {"opened": "opened", "saved": "saved"}
    doubt = "all that have it count as shown; make it missing for the others, by data.sql"
    assert doubt in check_of(text, "data.labels.opened")


@pytest.mark.parametrize("words", [("true", "false"), ("Yes", "No"), ("1", "0")])
def test_labels_may_be_texts(english, tmp_path, words):
    is_shown = english["lvl"] == 2
    text_of = np.where(english["opened"] == 1, *words)
    table = english.assign(opened=np.where(is_shown, text_of, "")).drop(columns=["saved", "m_b"])
    text, config = infer(tmp_path, table)
    assert config.data.labels.to_dict() == {"opened": "opened"}
    assert config.data.teacher.to_dict() == {"opened": "m_a"}
    assert check_of(text, "data.labels.opened") == "by its values; is it the label of a task?"


def test_two_scores_of_one_task_stay_open(english, tmp_path):
    text, config = infer(tmp_path, english.drop(columns="saved"))
    assert not config.data.teacher
    doubt = "which column has the teacher: 'm_a' or 'm_b'? Write {'TASK': 'COLUMN'}, or {} for none"
    assert check_of(text, "data.teacher") == doubt
    assert not {"m_a", "m_b"} & features_of(config).keys()


def test_a_device_is_no_user(english, tmp_path):
    """Most users have one device, so that values do not tell them apart."""
    person = english["person"]
    has_two = (person % 5 == 0) & (english["page_load"] > "0" * 26 + "5")
    table = english.assign(slab=10 * person + has_two, tenure=person % 7)
    text, config = infer(tmp_path, table)
    rivals = "which column has the user: 'slab' or 'person'?"
    assert config.data.columns.user == "?"
    assert check_of(text, "data.columns.user").startswith(rivals)


def test_a_session_is_no_user(english, tmp_path):
    """It owns the user; where nothing else is the user's, the values settle no role."""
    text, config = infer(tmp_path, english.drop(columns="tenure"))
    assert config.data.columns.user == "?"
    doubt = "which column has the user: 'visit' or 'person'?"
    assert check_of(text, "data.columns.user").startswith(doubt)


def test_all_clashes_of_named_roles_are_one_message(tmp_path):
    named = {
        "data.columns.item": "thing",
        "data.labels.a": "thing",
        "data.labels.b": "opened",
        "data.teacher": {"b": "opened"},
        "data.columns.request": "person",
        "data.columns.user": "person",
    }
    with pytest.raises(UserError) as caught:
        infer(tmp_path, "no/such/log", named)
    message = str(caught.value)
    assert "'thing' is data.columns.item and data.labels.a; " in message
    assert "'opened' is data.labels.b and data.teacher.b" in message
    assert "person" not in message  # a request of each user


def test_all_missing_columns_are_one_message(english, tmp_path):
    named = {"data.columns.item": "thin", "data.labels.opened": "opend"}
    with pytest.raises(UserError, match=r"item='thin' does not exist; .*opened='opend' does not"):
        infer(tmp_path, english, named)


def test_what_is_written_is_counted(english, tmp_path):
    written = kd.infer(english, tmp_path)
    lines = str(written).splitlines()
    assert lines[1] == (
        "9 lines need you (CHECK); 2 columns became features: is each known before the final "
        "ranker runs? 7 were left out: read why. Then"
    )
    assert lines[2] == f"    kd-ranker prepare --config={written.path}"


def test_roles_that_are_not_named_have_no_column():
    columns = kd.configs.columns(request="r", item="i")
    assert columns.keys() == kd.configs.parquet().data.columns.keys()
    assert {role: column for role, column in columns.items() if column} == {
        "request": "r",
        "item": "i",
    }
    with pytest.raises(UserError, match=r"data\.columns='itme' does not exist"):
        kd.configs.columns(itme="i")


def test_numbers_that_mean_none_are_missing(italian, tmp_path):
    rng = np.random.default_rng(7)
    none = rng.random(len(italian)) < 0.1
    minutes = np.where(none, -1, rng.integers(8, 80, size=len(italian)))
    stars = np.where(none, 0.0, rng.uniform(1.5, 5.0, size=len(italian)).round(1))
    change = rng.normal(size=len(italian)).round(1)
    place = italian["pos_scherm"] - italian["pos_scherm"].min() + 1
    table = italian.assign(
        attesa=minutes, stelle=stars, variazione=change, pos_scherm=place.fillna(0).astype(int)
    )
    text, config = infer(tmp_path, table)
    doubt = check_of(text, "data.sql")
    assert {*re.findall(r"(-?\d+) in '(\w+)'", doubt)} == {
        ("0", "pos_scherm"), ("-1", "attesa"), ("0", "stelle"),
    }  # fmt: skip
    assert config.data.columns.position == "pos_scherm"
    assert config.data.path == ""
    rows = duckdb.sql(config.data.sql).df()
    assert (rows["attesa"].isna() == none).all()
    assert [*rows["pos_scherm"].isna()] == [*italian["pos_scherm"].isna()]


def test_numbers_with_a_meaning_are_left_alone(italian, tmp_path):
    """-1 beside negative numbers, -1 of a position, which a dataset knows, and 0 of prices."""
    rng = np.random.default_rng(9)
    place = italian["pos_scherm"].fillna(-1).astype(int)
    cosine = rng.uniform(-1.0, 1.0, size=len(italian)).clip(-0.99).round(2)
    cosine[rng.random(len(italian)) < 0.05] = -1
    price = rng.gamma(2.0, 30.0, size=len(italian)).round(2)
    price[rng.random(len(italian)) < 0.05] = 0
    table = italian.assign(pos_scherm=place, coseno=cosine, prezzo=price)
    _, config = infer(tmp_path, table)
    assert config.data.columns.position == "pos_scherm"
    assert config.data.sql == ""


def test_numbers_for_none_in_lists_are_missing(tmp_path):
    log = owner_logs.OWNERS["polish"]
    table = pd.read_parquet(log.write(tmp_path))
    table["czas"] = [
        np.where(np.arange(len(of)) % 9, 8.5 + np.arange(len(of)), -1) for of in table["oferty"]
    ]
    text, config = infer(tmp_path / "none", table)
    assert config.data.rows == "request"
    assert check_of(text, "data.sql") == "does this mean none: -1 in 'czas'?"
    minutes = duckdb.sql(f"SELECT czas FROM ({config.data.sql})").fetchall()[0][0]
    assert [minute is None for minute in minutes] == [
        place % 9 == 0 for place in range(owner_logs.CANDIDATES)
    ]


def test_unfinished_files_are_in_no_select(italian, tmp_path):
    """A SELECT with a pattern would read them."""
    table = italian.assign(attesa=np.where(np.arange(len(italian)) % 9, 20.5, -1))
    (tmp_path / "_temporary").mkdir()
    table.to_parquet(tmp_path / "part.parquet")
    for name, pattern in (("whole", "**"), ("unfinished", "part.parquet")):
        config = infer(tmp_path / name, str(tmp_path))[1]
        assert pattern in config.data.sql
        assert len(duckdb.sql(config.data.sql).df()) == len(table)
        table.to_parquet(tmp_path / "_temporary" / "part.parquet")


def test_a_name_is_a_stem_of_a_label_only_if_it_holds_no_whole_word():
    labels = {"liked": "liked", "tapped": "tapped"}
    found = by_structure._called_after_labels(["p_tap", "p_liked", "likelihood"], labels)
    assert found == {"liked": "p_liked", "tapped": "p_tap"}


def test_texts_that_join_values_are_lists(italian, tmp_path):
    rng = np.random.default_rng(8)
    words = np.array(["rosso", "blu", "verde", "nero", "giallo", "viola"])
    colors = [["|".join(rng.permutation(words)[: 1 + i % 4])] for i in range(500)]
    item = italian["cod_off"].astype("category").cat.codes
    titles = [f"titolo {i}, volume {i % 7}" for i in range(500)]
    table = italian.assign(
        colori=[colors[i % 500][0] for i in item], titolo=[titles[i % 500] for i in item]
    )
    _, config = infer(tmp_path, table)
    assert features_of(config)["colori"] == ("item", "bag")
    assert "titolo" not in config.data.sql
    lists = duckdb.sql(config.data.sql).df()["colori"]
    assert list(lists[0]) == table["colori"].iloc[0].split("|")


def test_texts_of_words_are_no_lists(italian, tmp_path):
    words = np.array(["rosso", "blu", "verde", "nero", "giallo", "viola", "grigio"])
    rng = np.random.default_rng(11)
    phrases = [" ".join(rng.permutation(words)[: 1 + i % 4]) for i in range(500)]
    places = [", ".join(rng.permutation(words)[: 1 + i % 4]) for i in range(500)]
    history = [" ".join(f"N{n}" for n in rng.integers(40, size=1 + i % 4)) for i in range(500)]
    item = italian["cod_off"].astype("category").cat.codes
    of_items = {"frase": phrases, "luogo": places, "letti": history}
    table = italian.assign(**{name: [of[i] for i in item] for name, of in of_items.items()})
    _, config = infer(tmp_path, table)
    assert re.findall(r"string_split\(\"(\w+)\"", config.data.sql) == ["letti"]


def test_a_text_with_a_comma_is_no_stage(italian, tmp_path):
    """Commas separate the texts of a stage in a config."""
    shown, passed = italian["pos_scherm"].notna(), italian["pb_fin"].notna()
    stage = np.where(shown, "SEEN, TOP", np.where(passed, "PASS", "CUT"))
    _, config = infer(tmp_path, italian.assign(fase=stage))
    assert config.data.columns.stage == "?"
    named = np.where(shown, "shown", np.where(passed, "pass,ed", "retrieved"))
    _, config = infer(tmp_path / "named", italian.assign(stage=named))
    assert not config.data.stages.get("passed")


def test_a_user_of_0_may_be_nobody(italian, tmp_path):
    """Though it has few of the requests."""
    users = italian["cod_cand"].str[1:].astype(int) + 1
    most_frequent = italian.drop_duplicates("cod_ric")["cod_cand"].mode()[0]
    table = italian.assign(cod_cand=users.where(italian["cod_cand"] != most_frequent, 0))
    text, config = infer(tmp_path, table)
    assert config.data.columns.user == "cod_cand"
    assert "'0' has " in check_of(text, "data.columns.user")


def test_what_guests_lack_is_no_outcome(italian, tmp_path):
    """They have no account, no age of it, and here no click either."""
    guests = italian["cod_ric"].isin(italian["cod_ric"].drop_duplicates()[::5])
    age = italian["cod_cand"].str[1:].astype(int) * 3 + italian["cod_ric"].str[-1:].eq("0")
    table = italian.assign(
        cod_cand=italian["cod_cand"].mask(guests),
        eta_conto=age.astype(float).mask(guests),
        settore=italian["settore"].mask(guests),
        aperto=italian["aperto"].mask(guests & (italian["aperto"] == 1), 0),
    )
    text, config = infer(tmp_path, table, {"data.columns.user": "cod_cand"})
    assert "eta_conto" in features_of(config), left_out(text).get("eta_conto")


def test_a_weight_of_requests_is_no_feature(italian, tmp_path):
    weights = np.where(italian["canale"] == "app", 100, 20)
    text, _ = infer(tmp_path, italian.assign(req_wgt=weights))
    assert left_out(text)["req_wgt"] == "a weight, by its name"


def test_objects_of_a_history_are_no_candidates(italian, tmp_path):
    events = [[{"item_id": 7, "seconds": 3.5}, {"item_id": 8, "seconds": 1.0}]] * len(italian)
    device = [{"model": f"m{row % 5}", "os": "ios"} for row in range(len(italian))]
    table = italian.rename(columns={"cod_off": "item_id"}).assign(eventi=events, telefono=device)
    text, config = infer(tmp_path, table)
    assert left_out(text)["eventi"] == "its type is not supported"
    assert "unnest" not in config.data.sql
    assert {"telefono_model", "telefono_os"} <= {*duckdb.sql(config.data.sql).columns}


def test_objects_in_lists_are_candidates(tmp_path):
    """As JSON has them, with the same roles as a row per candidate."""
    rng = np.random.default_rng(9)
    requests = []
    for number in range(300):
        scores = rng.normal(size=30)
        order = np.argsort(np.argsort(-scores))
        candidates = [
            {
                "video_id": int(item), "stage": "shown" if rank < 5 else "retrieved",
                "kind": {"name": f"k{item % 7}"}, "tags": ["a", f"b{item % 5}"],
                **({"position": int(rank), "clicked": bool(item % 3)} if rank < 5 else {}),
            }
            for item, rank in zip(rng.permutation(200)[:30], order, strict=True)
        ]  # fmt: skip
        requests.append(
            {"request_id": f"r{number}", "ts": 1_750_000_000 + 60 * number,
             "user_id": number % 40, "kind": "home", "candidates": candidates,
             "recent": [{"video": 3, "at": 7}, {"video": 4, "at": 8}]}
        )  # fmt: skip
    file = tmp_path / "log.json"
    file.write_text("\n".join(map(json.dumps, requests)))
    text, config = infer(tmp_path, str(file))
    assert "is each object in 'candidates' a candidate?" in check_of(text, "data.sql")
    columns = config.data.columns
    assert (columns.request, columns.item, columns.user) == ("request_id", "video_id", "user_id")
    assert (columns.stage, columns.position) == ("stage", "position")
    assert config.data.labels.click == "clicked"
    assert features_of(config)["kind_name"] == ("item", "category")
    assert features_of(config)["tags"] == ("item", "bag")
    assert len(duckdb.sql(config.data.sql).df()) == 300 * 30


def test_only_one_column_of_lists_is_unnested(tmp_path):
    """Else each candidate would have a row per event of a history."""
    requests = [
        {
            "anfrage": f"a{number}",
            "dinge": [{"ding": 7 * number % 50 + k, "wert": k, "art": "x"} for k in range(20)],
            "zuletzt": [{"film": 3, "tag": 7}, {"film": 4, "tag": 8}],
        }
        for number in range(100)
    ]
    file = tmp_path / "log.json"
    file.write_text("\n".join(map(json.dumps, requests)))
    text, config = infer(tmp_path, str(file))
    assert "is each object in 'dinge' a candidate?" in check_of(text, "data.sql")
    assert len(duckdb.sql(config.data.sql).df()) == 100 * 20
    assert left_out(text)["zuletzt"] == "its type is not supported"


def test_the_time_of_a_request_is_not_that_of_its_writing(english, tmp_path):
    request = pd.factorize(english["page_load"])[0]
    later = pd.to_datetime(english["at"]) + pd.to_timedelta(request % 97, "h")
    text, config = infer(tmp_path, english.assign(written_at=later))
    assert config.data.columns.time == "at"
    assert left_out(text)["written_at"] == "a date or a time, and no number"
    text, config = infer(tmp_path / "other", english.assign(other_at=later))
    assert config.data.columns.time == ""


def test_a_column_called_a_model_s_version_may_be_the_teacher_s(italian, tmp_path):
    """Two versions serve at the same time."""
    version = np.array(["v41", "v42"])[pd.factorize(italian["cod_ric"])[0] % 2]
    table = italian.drop(columns="ver_mod").assign(rankerVer=version)
    text, config = infer(tmp_path, table)
    assert config.data.columns.teacher_version == "rankerVer"
    assert is_checked(text, "data.columns.teacher_version")
    assert is_checked(text, "data.teacher_version")
    for name in ("app_ver", "early_model_ver"):
        _, config = infer(tmp_path / name, table.rename(columns={"rankerVer": name}))
        assert config.data.columns.teacher_version == ""


def test_requests_may_have_lost_their_labels(italian, tmp_path):
    shown, passed = italian["pos_scherm"].notna(), italian["pb_fin"].notna()
    stage = np.where(shown, "SEEN", np.where(passed, "PASS", "CUT"))
    is_lost = pd.Series(pd.factorize(italian["cod_ric"])[0] % 10 == 0, italian.index)
    lost = italian.assign(fase=stage, aperto=italian["aperto"].mask(is_lost))
    _, config = infer(tmp_path, lost)
    assert config.data.columns.stage == "fase"
    assert config.data.stages.shown == "SEEN"


def test_what_was_seen_or_paid_for_is_no_task(italian, tmp_path):
    shown = italian["pos_scherm"].notna()
    is_third = shown & (np.arange(len(italian)) % 3 == 0)
    table = italian.assign(seen=is_third.astype(int), sponsored=(shown & ~is_third).astype(int))
    text, config = infer(tmp_path, table)
    assert not {"seen", "sponsored"} & {*config.data.labels.values()}
    reasons = left_out(text)
    assert reasons["seen"] == reasons["sponsored"] == "no action of a user, by its name"


def test_years_of_experience_are_perhaps_an_experiment(italian, tmp_path):
    user = pd.factorize(italian["cod_cand"])[0]
    text, config = infer(tmp_path, italian.assign(years_exp=user % 40 + 0.5))
    assert "years_exp" not in features_of(config)
    line = (
        "# data.features.years_exp = configs.feature('user', 'dense')  # perhaps of an experiment"
    )
    assert line in text


def test_a_request_that_was_written_twice_has_its_candidates_once(english, tmp_path):
    is_first = english["page_load"] == english["page_load"].iloc[0]
    _, config = infer(tmp_path, pd.concat([english, english[is_first]]))
    assert config.funnel.retrieved == owner_logs.CANDIDATES


def test_the_rate_of_an_item_is_no_prediction(english, tmp_path):
    rng = np.random.default_rng(0)
    rate = rng.uniform(0.01, 0.99, len(english))
    is_new = (english["lvl"] != 2) & (rng.random(len(english)) < 0.1)
    names = {"m_a": "p_opened", "m_b": "p_saved"}
    table = english.rename(columns=names).assign(opened_rate=np.where(is_new, np.nan, rate))
    text, config = infer(tmp_path, table)
    found = {config.data.labels[task]: column for task, column in config.data.teacher.items()}
    assert found == {"opened": "p_opened", "saved": "p_saved"}
    assert "opened_rate" in left_out(text)


@pytest.mark.parametrize(("name", "kind"), [("author_fans", "dense"), ("fan_code", "category")])
def test_the_last_word_of_a_name_says_what_a_number_is(english, tmp_path, name, kind):
    _, config = infer(tmp_path, english.assign(**{name: english["thing"] % 29}))
    assert features_of(config)[name] == ("item", kind)


def with_flag(italian: pd.DataFrame) -> pd.DataFrame:
    """Say in a column of its own who was passed."""
    return italian.assign(ammesso=italian["pb_fin"].notna())


def test_a_flag_of_the_passed_is_a_stage_next_to_positions(italian, tmp_path):
    text, config = infer(tmp_path, with_flag(italian))
    assert config.data.columns.stage == "ammesso"
    assert config.data.stages.to_dict() == {"retrieved": "False", "passed": "True"}
    doubt = "those with a position count as shown; are the others passed, or retrieved?"
    assert check_of(text, "data.stages") == doubt
    sizes = (config.funnel.passed, config.funnel.shown)
    assert sizes == (owner_logs.PASSED, owner_logs.SHOWN)


def test_the_order_by_the_early_score_tells_a_flag_of_the_passed(italian, tmp_path):
    """No score of the final ranker is known of the passed alone."""
    scored = with_flag(italian)
    _, config = infer(tmp_path, scored.assign(pb_fin=scored["pb_fin"].fillna(0.01)))
    assert config.data.columns.stage == "ammesso"


def test_a_flag_that_no_score_confirms_is_no_stage(italian, tmp_path):
    is_shown = italian["pos_scherm"].notna()
    rng = np.random.default_rng(0)
    in_stock = is_shown | (rng.random(len(italian)) < 0.4)
    _, config = infer(tmp_path, italian.assign(disponibile=in_stock))
    assert config.data.columns.stage == ""
    is_passed = with_flag(italian)["ammesso"]
    table = italian.assign(ammesso=is_passed & ~(is_shown & (rng.random(len(italian)) < 0.1)))
    _, config = infer(tmp_path / "other", table)
    assert config.data.columns.stage == ""


def test_two_flags_of_the_passed_are_a_question(italian, tmp_path):
    table = with_flag(italian)
    text, config = infer(tmp_path, table.assign(scelto=table["ammesso"].astype(int)))
    assert config.data.columns.stage == "?"
    doubt = "which column has the stage: 'ammesso' or 'scelto'?"
    assert check_of(text, "data.columns.stage") == doubt


def test_the_score_that_orders_the_shown_is_of_the_label_it_ranks_best(italian, tmp_path):
    is_shown = italian["pos_scherm"].notna()
    rng = np.random.default_rng(0)
    saved = (rng.random(len(italian)) < 0.3).astype(float)
    aside = pd.Series(rng.random(len(italian)), italian.index).where(italian["pb_fin"].notna())
    order = italian["pos_scherm"].rank(ascending=False) + 0.5
    table = italian.assign(salvato=saved, affine=aside, pb_fin=order.fillna(italian["pb_fin"]))
    table["salvato"] = table["salvato"].where(is_shown)
    text, config = infer(tmp_path, table)
    assert config.data.teacher.to_dict() == {"aperto": "pb_fin"}
    assert is_checked(text, "data.teacher.aperto")
    twin = table.assign(affine=2 * table["pb_fin"])
    _, config = infer(tmp_path / "two", twin)
    assert not config.data.teacher


def test_the_early_scores_of_whole_requests_may_be_lost(italian, tmp_path):
    request = pd.factorize(italian["cod_ric"])[0]
    lost = italian.assign(nota_pre=italian["nota_pre"].mask(request % 40 == 0))
    _, config = infer(tmp_path, lost)
    assert config.data.columns.incumbent == "nota_pre"
    gaps = italian.assign(nota_pre=italian["nota_pre"].mask(italian.index % 40 == 0))
    _, config = infer(tmp_path / "gaps", gaps)
    assert config.data.columns.incumbent == ""


def test_zeros_of_whole_requests_are_lost_scores(italian, tmp_path):
    is_lost = pd.factorize(italian["cod_ric"])[0] % 20 == 0
    zeros = italian.assign(nota_pre=italian["nota_pre"].mask(is_lost, 0.0))
    text, config = infer(tmp_path, zeros)
    assert check_of(text, "data.sql") == "does this mean none: 0 in 'nota_pre'?"
    assert 'nullif("nota_pre", 0)' in config.data.sql
    several = zeros.assign(nota_pre=zeros["nota_pre"].mask(zeros.index % 50 == 0, 0.0))
    _, config = infer(tmp_path / "elsewhere", several)
    assert not config.data.sql


@pytest.mark.parametrize(
    ("lost", "what"),
    [("pb_fin", "whether the final ranker scored the request"), ("aperto", "for which requests")],
)
def test_the_status_of_a_request_that_lost_something_is_no_feature(italian, tmp_path, lost, what):
    request = pd.factorize(italian["cod_ric"])[0]
    status = np.where(request % 12 == 0, "LOST", np.where(request % 2, "A", "B"))
    table = italian.assign(stato=status)
    table[lost] = table[lost].mask(status == "LOST")
    text, config = infer(tmp_path, table)
    assert left_out(text)["stato"].startswith(f"tells {what}")
    _, config = infer(tmp_path / "known", italian.assign(stato=status))
    assert features_of(config)["stato"] == ("context", "category")


def test_an_id_as_large_as_a_time_is_the_item(italian, tmp_path):
    ids = 1_200_000_000 + pd.factorize(italian["cod_off"])[0]
    table = italian.drop(columns="cod_off").assign(off_id=ids)
    _, config = infer(tmp_path, table)
    assert config.data.columns.item == "off_id"
