"""The role of each column: named by the user, else by its name, else by its values."""

from collections.abc import Callable, Collection, Iterable, Mapping

import pandas as pd

from kd_ranker.errors import UserError, listed
from kd_ranker.sources.logs.data_report import LEAST_USERS, MOST_OF_A_USER
from kd_ranker.sources.logs.infer import by_name, by_structure
from kd_ranker.sources.logs.infer.guess import Guess, Roles, by_values, column_of, which
from kd_ranker.sources.logs.infer.markers import find_markers
from kd_ranker.sources.logs.infer.sample import Sample
from kd_ranker.sources.logs.infer.words import identifier, is_showing, without, words
from kd_ranker.sources.logs.layout import OPEN, split_at_commas
from kd_ranker.sources.logs.written_after import guess_shown, why_written_after

_SECTIONS = ("data.columns.", "data.labels.", "data.teacher.")
# Numbers of a user that may mean none.
_NOBODY = ("0", "-1")
# Pairs of roles that one column may have.
_COMPATIBLE = (
    {"data.columns.request", "data.columns.user"},
    {"data.columns.incumbent", "data.columns.early_scores"},
)


def check_clashes(named: Mapping[str, str]) -> None:
    """Raise UserError for all columns to which the user gave two roles."""
    roles: dict[str, list[str]] = {}
    for key, column in named.items():
        if key.startswith(_SECTIONS) and column not in ("", OPEN):
            roles.setdefault(column, []).append(key)
    clashes = [
        f"{column!r} is {' and '.join(keys)}"
        for column, keys in roles.items()
        if len(keys) > 1 and {*keys} not in _COMPATIBLE
    ]
    if clashes:
        raise UserError(f"a column has one role: {'; '.join(clashes)}; give it only one of these")


def check_named_columns(sample: Sample) -> None:
    """Raise UserError for all columns that the user named and the log lacks."""
    missing = []
    for key, column in sample.named.items():
        is_role = key.startswith(_SECTIONS) and key != "data.columns.early_scores"
        if is_role and column not in ("", OPEN) and column not in sample.facts.index:
            missing.append(f"{key}={column!r} does not exist")
    if missing:
        columns = listed(sorted(sample.facts.index))
        raise UserError(f"{'; '.join(missing)}; choose one of: {columns}")


def find_roles(sample: Sample) -> Roles:
    """Find the columns of all roles, and complete the facts by them."""
    columns = _named(sample, "data.columns.")
    labels = _named(sample, "data.labels.")
    teacher = _named(sample, "data.teacher.")
    used = [guess.value for guess in (*labels.values(), *teacher.values())]
    for role, find in by_structure.OWNERS.items():
        if role not in columns:
            columns[role] = _choose(role, sample, _used(columns, used), find)
        sample.set_owner(role, column_of(columns, role))
    sample.set_missing(find_markers(sample))
    columns["user"] = _doubt_user_of_many(sample, columns["user"])
    if "stage" not in columns:
        columns["stage"] = by_name.choose("stage", sample, _used(columns, used))
    stage = column_of(columns, "stage")
    stages = by_name.stage_texts(sample, stage) if stage else {}
    stages = by_name.named_stages(sample, stage, stages)
    _find_shown(sample, stage, stages)
    if _is_open("stage", columns, sample) and sample.shown.any():
        found, stages = by_structure.find_stage(sample)
        columns["stage"] = _propose("stage", columns["stage"], found)
        _find_passed(sample, column_of(columns, "stage"), stages)
    for role in by_name.FITS:
        if role not in columns:
            columns[role] = by_name.choose(role, sample, _used(columns, used))
    if _is_open("position", columns, sample):
        found = by_structure.find_position(sample)
        columns["position"] = _propose("position", columns["position"], found)
    position = column_of(columns, "position")
    if position and _is_open("stage", columns, sample) and sample.shown.any():
        found, stages = by_structure.find_passed(sample)
        columns["stage"] = _propose("stage", columns["stage"], found)
        _find_passed(sample, column_of(columns, "stage"), stages)
    labels = _find_labels(sample, labels, _used(columns, used))
    labels = {
        task: guess if column_of(columns, "stage") else _doubt_labels_of_all(sample, guess)
        for task, guess in labels.items()
    }
    written_after = find_written_after(sample, Roles(columns, labels, {}, {}, "").used())
    found_teacher, doubt = _find_teacher(sample, labels, teacher, written_after, position)
    if not sample.passed.any():
        scores = [guess.value for guess in found_teacher.values()]
        sample.passed = sample.codes[scores].notna().any(axis=1)
    if _is_open("incumbent", columns, sample):
        used = Roles(columns, labels, found_teacher, {}, "").used()
        found = by_structure.find_incumbent(sample, used)
        columns["incumbent"] = _propose("incumbent", columns["incumbent"], found)
    time = column_of(columns, "time")
    if time and _is_open("teacher_version", columns, sample):
        found = by_structure.find_version(sample, time)
        columns["teacher_version"] = _propose("teacher_version", columns["teacher_version"], found)
    texts = {stage: Guess(text) for stage, text in stages.items()}
    if column_of(columns, "stage") and not texts:
        texts = {"shown": Guess("", "", "which text has a shown candidate? Name all stages")}
    for role in ("request", "user"):
        guess = columns[role]
        if guess.check and not column_of(columns, role):
            advice = "Name it and infer again: much else depends on it"
            columns[role] = guess._replace(check=f"{guess.check} {advice}")
    if columns["stage"].check:
        texts |= _doubt_texts(stages)
    return Roles(columns, labels, found_teacher, texts, doubt)


def _doubt_texts(stages: Mapping[str, str]) -> dict[str, Guess]:
    """Return the stages whose texts may be of another stage, with the question."""
    if "shown" not in stages:
        doubt = "those with a position count as shown; are the others passed, or retrieved?"
        return {stage: Guess(texts, "", doubt) for stage, texts in stages.items()}
    doubtful = {}
    for stage, texts in stages.items():
        is_only_other = len(stages) == 2 and stage != "shown"
        if is_only_other:
            doubtful[stage] = Guess(texts, "", f"is {texts!r} retrieved, or passed?")
        elif len(split_at_commas(texts)) > 1:
            doubtful[stage] = Guess(texts, "", f"are all of these {stage}: {texts}?")
    return doubtful


def _named(sample: Sample, section: str) -> dict[str, Guess]:
    """Return the columns that the user named in a section such as `data.labels.`."""
    return {
        key.removeprefix(section): Guess(column)
        for key, column in sample.named.items()
        if key.startswith(section)
    }


def _used(columns: Mapping[str, Guess], others: Iterable[str]) -> list[str]:
    """Return the columns that have a role already."""
    return [*others, *(guess.value for guess in columns.values())]


def _choose(
    role: str, sample: Sample, used: list[str], find: Callable[[Sample], by_structure.Found]
) -> Guess:
    """Return the column of an owner or of the time: by its name, else by its values."""
    guess = by_name.choose(role, sample, used)
    if guess.value not in ("", OPEN):
        return guess
    found = find(sample)
    sure = by_name.sure_columns(role, sample)
    if found.column and found.column in used:
        return guess
    # Two columns may be called like the role; the values cannot mean a third one.
    if sure and not {found.column, *found.rivals} & {*sure}:
        return guess
    return _propose(role, guess, found)


def _doubt_user_of_many(sample: Sample, guess: Guess) -> Guess:
    """Doubt a user with a large part of all requests: it may stand for those without an account."""
    column = guess.value.strip(OPEN)
    if not column or column not in sample.facts.index:
        return guess
    of_requests = sample.texts(column).groupby(sample.request).first()
    shares = of_requests.value_counts(normalize=True)
    if shares.empty:
        return guess
    is_one_of_many = len(shares) >= LEAST_USERS and shares.iloc[0] >= MOST_OF_A_USER
    if not is_one_of_many and shares.index[0] not in _NOBODY:
        return guess
    doubt = f"{shares.index[0]!r} has {shares.iloc[0]:.0%} of the requests; is it nobody?"
    return guess._replace(check=f"{guess.check} {doubt}".strip())


def _is_open(role: str, columns: Mapping[str, Guess], sample: Sample) -> bool:
    return not column_of(columns, role) and f"data.columns.{role}" not in sample.named


def _propose(role: str, guess: Guess, found: by_structure.Found) -> Guess:
    """Return what the values point at, or name the rivals; else the guess by name."""
    called = by_name.CALLED.get(role, role)
    if found.column:
        return by_values(found.column, called)
    called_so = [column for column in found.rivals if by_name.has_word_of(role, column)]
    if len(called_so) == 1:
        return by_values(called_so[0], called)
    if found.rivals:
        value = "" if role in by_name.REQUIRED else OPEN
        return Guess(value, "", which(called, found.rivals))
    return guess


def _find_shown(sample: Sample, stage: str, stages: Mapping[str, str]) -> None:
    """Find who was shown and passed: by stages, by labels of known tasks, or by structure."""
    if stages:
        texts = sample.texts(stage)
        sample.set_shown(texts.isin(split_at_commas(stages["shown"])))
        _find_passed(sample, stage, stages)
        return
    facts = sample.facts
    named = [
        column for key, column in sample.named.items() if key.startswith("data.labels.") and column
    ]
    is_label = (facts["binary"] & (facts["task"] != "")) | facts.index.isin(named)
    partly_known = is_label & (facts["known"] < 0.99)
    shown = sample.codes.loc[:, partly_known].notna().any(axis=1)
    if not shown.any():
        found = by_structure.find_shown(sample)
        shown = shown if found is None else found
    sample.set_shown(shown)


def _find_passed(sample: Sample, stage: str, stages: Mapping[str, str]) -> None:
    if "passed" in stages and "retrieved" in stages:
        retrieved = split_at_commas(stages["retrieved"])
        sample.passed = ~sample.texts(stage).isin(retrieved)


def _find_labels(sample: Sample, named: dict[str, Guess], used: list[str]) -> dict[str, Guess]:
    """Find the label of each task: 0 or 1, by its name, or known only where shown.

    Labels that the user named together, as a section, are all that there are.
    """
    labels = dict(named)
    if labels and "data.labels" in sample.sections:
        return labels
    facts = sample.facts
    possible = facts[by_name.may_be_label(facts) & ~facts["no_actions"]]
    possible = possible.drop(used, errors="ignore")
    is_rare_elsewhere = possible["ones_out"] <= 0.2 * possible["ones_in"]
    is_named = (possible["task"] != "") & (possible["only_shown"] | is_rare_elsewhere)
    by_structure_only = [
        column
        for column in by_structure.find_labels(sample)
        if column in possible.index and not is_showing(column)
    ]
    for column, task in possible[is_named]["task"].items():
        task = task if task not in labels else identifier(str(column), labels)
        labels[task] = Guess(column)
    for column in by_structure_only:
        if not is_named[column]:
            labels[identifier(column, labels)] = by_values(column, "label of a task")
    if labels:
        return labels
    return {"label": Guess("", "", which("label, 0 or 1", possible.index))}


def _doubt_labels_of_all(sample: Sample, guess: Guess) -> Guess:
    """Doubt a label that others than the shown have: without stages, it says who was shown."""
    column = guess.value
    if not column or not sample.shown.any() or sample.facts["known_out"][column] < 0.01:
        return guess
    doubt = "all that have it count as shown; make it missing for the others, by data.sql"
    return guess._replace(check=f"{guess.check} {doubt}".strip())


def find_written_after(sample: Sample, used: Collection[str]) -> dict[str, str]:
    """Return the columns without a role that were written after the ranking, and why it seems so.

    Only columns that may differ among the candidates of a request are looked at, by their values.
    """
    facts = sample.facts
    may_vary = by_name.varies_in_requests(facts) & (facts["user"] != 1) & (facts["distinct"] > 1)
    varying = facts[may_vary & facts["kind"].isin(["integer", "float", "text"])]
    shown, passed = sample.shown, sample.passed
    if not shown.any():
        has_task = by_name.may_be_label(facts) & (facts["task"] != "")
        named = [column for key, column in sample.named.items() if key.startswith("data.labels.")]
        labels = [*facts.index[has_task], *filter(None, named)]
        positive = (sample.numbers[labels] == 1).any(axis=1)
        shown = guess_shown(sample.codes[varying.index.difference(labels)], positive)
    signs: dict[str, str] = {}
    for column in varying.index.difference([*used]):
        codes, numbers = sample.codes[column], sample.numbers[column]
        why = why_written_after(codes, numbers, sample.request, shown)
        if passed.any() and not why:
            why = why_written_after(codes, numbers, sample.request, passed, "passed")
        if why:
            signs[column] = why
    return signs


def _find_teacher(
    sample: Sample,
    labels: Mapping[str, Guess],
    named: dict[str, Guess],
    written_after: Collection[str],
    position: str,
) -> tuple[dict[str, Guess], str]:
    """Find the teacher's column of each task, and name further columns that may be one.

    `position` is the column of the places of the shown; "" for none.
    """
    columns = {task: guess for task, guess in named.items() if guess.value}
    used = [guess.value for guess in (*labels.values(), *columns.values())]
    free = sample.facts[by_name.may_be_teacher(sample.facts)].drop(used, errors="ignore")
    probabilities = free[by_name.is_probability(free)]
    # An early ranker's score is known of all candidates, and a final ranker's of those passed.
    known_of_passed = (probabilities["known"] < 0.99) & (probabilities["known_in"] > 0.9)
    known_of_passed &= probabilities["known_out"] <= 0.5 * probabilities["known_in"]
    likely = [*probabilities.index[known_of_passed]]
    likely += [*free.index[free["teacher"] & free["ranks"]]]
    open_tasks = {}
    for task, label in labels.items():
        names = _outputs_of_task(free, task, label.value)
        # The rate of an item's clicks is known of all candidates.
        names = [name for name in names if known_of_passed.get(name, False)] or names
        likely = names + likely
        is_only_score = len(names) == 1 and by_name.may_be_score(free)[names[0]]
        if task in named or not label.value:
            continue
        if is_only_score and by_structure.correlates(sample.numbers[[names[0], label.value]]):
            columns[task] = Guess(names[0])
        else:
            open_tasks[task] = label.value
    if open_tasks and "data.teacher" not in sample.sections:
        settled = [guess.value for guess in columns.values()]
        for task, score in by_structure.find_teacher(sample, open_tasks, settled).items():
            columns[task] = by_values(score, f"final ranker's score of {task!r}")
        if position and not columns:
            possible = [*free.index[by_name.may_be_score(free)].difference([position])]
            by_order = by_structure.find_score_of_order(sample, open_tasks, position, possible)
            for task, score in by_order.items():
                columns[task] = by_values(score, f"final ranker's score of {task!r}")
    if not columns:
        floats = free.index[(free["kind"] == "float") & ~free["only_shown"]]
        is_unclear = not sample.shown.any()
        likely += [
            column
            for column in floats
            if column in written_after or (is_unclear and column in probabilities.index)
        ]
    chosen = {guess.value for guess in columns.values()}
    likely = [column for column in dict.fromkeys(likely) if column not in chosen]
    is_named = "data.teacher" in sample.sections or named.keys() >= labels.keys()
    if is_named or not likely:
        return columns, ""
    doubt = which("teacher", likely)
    if len(labels) > 1:
        doubt = f"which columns have the teacher, one per task: {', '.join(map(repr, likely[:3]))}?"
    return columns, f"{doubt} Write {{'TASK': 'COLUMN'}}, or {{}} for none"


def find_signal(sample: Sample, roles: Roles) -> Guess | None:
    """Return what the teacher's columns hold; None for probabilities, or without a teacher."""
    columns = [guess.value for guess in roles.teacher.values() if guess.value]
    facts = sample.facts.loc[columns]
    facts = facts[(facts["low"] < 0) | (facts["high"] > 1)]
    if facts.empty:
        return None
    outside = f"{facts.index[0]!r} leaves [0, 1]"
    if by_name.may_count_places(facts).all():
        return Guess("rank", "", f"{outside}; does it hold positions, smallest first?")
    return Guess("score", "", f"{outside}; does it hold scores, higher first?")


def _outputs_of_task(free: pd.DataFrame, task: str, label: str) -> list[str]:
    """Return the columns that are called like a model's output for a task, or for its label.

    Those that are called like a teacher are returned alone.
    """
    outputs = free.index[free["teacher"] | free["outputs"] | free["predictions"]]
    words_of_label = words(label) or None
    names = [
        name
        for name in outputs
        if without(name, "outputs", "teacher") == words_of_label or free["task"][name] == task
    ]
    return [name for name in names if free["teacher"][name]] or names
