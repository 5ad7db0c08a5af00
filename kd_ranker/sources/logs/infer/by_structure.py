"""The roles that the values of columns point at where their names say nothing.

What this file finds is only proposed: each line of the config has a CHECK above it. Rows are
candidates here. Where two columns fit equally, there is no proposal, and both are named.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.sources.logs.infer.by_name import (
    is_probability,
    may_be_item,
    may_be_label,
    may_be_score,
    may_be_teacher,
    may_count_places,
    varies_in_requests,
)
from kd_ranker.sources.logs.infer.guess import join
from kd_ranker.sources.logs.infer.markers import counts_places
from kd_ranker.sources.logs.infer.sample import Sample
from kd_ranker.sources.logs.infer.words import without
from kd_ranker.sources.logs.layout import NO_PLACE
from kd_ranker.sources.logs.written_after import share_shown_first

# Fewer values are a category, not the requests, items or users of a log.
_LEAST_OWNERS = 10
# A share of rows that is as good as none.
_HARDLY = 0.005
# A share of rows that may be wrong.
_STRAY = 0.01
# Fewer labels of 1 may lie in any rows by chance.
_LEAST_ONES = 20
# Least share of the passed candidates that the early ranker's score has first: quotas of sources,
# and rules, pass some of the others.
_ORDERS_PASSED = 0.8
# A score is known of some rejected candidates, to monitor it, but only of this share.
_RARELY = 0.2
# Least correlation of positions and the final ranker's score, which rules of a page disturb, and
# how many times that of any other score it is.
_ORDERS_SHOWN, _CLEARLY = 0.4, 2
# A shorter name of a label may be a part of others by chance.
_LEAST_LETTERS = 3
_LONGEST_ENDING = 3  # such as `ped` of tapped
# The requests of a session take at most this share of the time of a log.
_SESSION = 0.05


class Found(NamedTuple):
    """The column that fits a role, or the columns that do so equally."""

    column: str = ""
    rivals: tuple[str, ...] = ()


def find_request(sample: Sample) -> Found:
    """Find the finest column within which the times are constant and the items differ."""
    facts = sample.facts
    is_possible = facts["is_id"] & facts["groups"] & (facts["unit"] == "") & ~facts["is_prose"]
    is_possible &= (facts["known"] > 0.99) & (facts["distinct"] >= _LEAST_OWNERS)
    possible = [*facts.index[is_possible]]
    if sample.layout.guess.value == "candidate":
        possible = [column for column in possible if _looks_like_request(sample, column)]
    found = _finest(sample, possible)
    # A session may have hardly more than one request.
    others = [column for column in found.rivals if not facts["sessions"][column]]
    return Found(others[0]) if len(others) == 1 else found


def _looks_like_request(sample: Sample, column: str) -> bool:
    facts = sample.facts
    is_time = ((facts["kind"] == "time") | (facts["unit"] != "")) & (facts["known"] > 0.99)
    times = facts.index[is_time & (facts["distinct"] > 1)]
    if not (sample.constant_within(column, times) == 1).any():
        return False
    repeats = facts["is_id"] & (facts["distinct"] < facts["rows"] / 1.2) & ~facts["binary"]
    items = facts.index[repeats & (facts["known"] > 0.95) & (facts["distinct"] >= _LEAST_OWNERS)]
    owner = sample.codes[column]
    return any(_hardly_repeats(sample.codes[item], owner) for item in items.drop(column))


def _hardly_repeats(values: pd.Series, owner: pd.Series) -> bool:
    pairs = pd.DataFrame({"owner": owner, "value": values}).dropna()
    return bool(pairs.duplicated().mean() <= _HARDLY)


def _finest(sample: Sample, possible: list[str]) -> Found:
    """Return the column with the most values, if each of the others is constant within it."""
    if not possible:
        return Found()
    finest = str(sample.facts["distinct"][possible].idxmax())
    others = [column for column in possible if column != finest]
    rivals = [other for other in others if not _is_coarser(sample, other, finest)]
    return Found("", (finest, *rivals)) if rivals else Found(finest)


def _is_coarser(sample: Sample, column: str, finest: str) -> bool:
    """Return whether a column groups the values of another one, and is not one to one with it."""
    is_constant = sample.constant_within(finest, [column])[column] == 1
    is_one_to_one = sample.facts["distinct"][column] >= 0.99 * sample.facts["distinct"][finest]
    return is_constant and not is_one_to_one


def find_item(sample: Sample) -> Found:
    """Find the id of candidates that occurs in several requests, and settles the most columns."""
    facts = sample.facts
    if facts["request"].isna().all():
        return Found()
    hardly_repeats = facts["in_requests"] >= (1 - _HARDLY) * facts["rows"]
    repeats_elsewhere = facts["distinct"] < facts["rows"] / 1.2
    is_possible = may_be_item(facts) & hardly_repeats & repeats_elsewhere & ~facts["is_prose"]
    is_possible &= (facts["unit"] == "") & (facts["distinct"] >= _LEAST_OWNERS)
    largest = sample.request.value_counts().max()
    counts_candidates = facts["low"].isin([0, 1]) & (facts["high"] <= largest)
    possible = facts.index[is_possible & ~counts_candidates]
    varying = facts.index[facts["request"] == 0]
    settled = {
        column: int((sample.constant_within(column, varying.drop(column)) == 1).sum())
        for column in possible
    }
    best = [column for column in possible if settled[column] == max(settled.values())]
    return Found(best[0]) if len(best) == 1 else Found("", tuple(best))


def find_user(sample: Sample) -> Found:
    """Find the finest id that owns several requests and, with them, other columns."""
    facts = sample.facts
    if facts["request"].isna().all():
        may_own = facts["is_id"] & (facts["item"] != 1) & ~facts["is_prose"] & ~facts["system"]
        return Found("", (*facts.index[may_own & (facts["distinct"] >= _LEAST_OWNERS)],))
    num_requests = sample.request.nunique()
    is_possible = facts["is_id"] & (facts["request"] == 1) & (facts["item"] != 1)
    is_possible &= (facts["unit"] == "") & (facts["distinct"] >= _LEAST_OWNERS)
    is_possible &= (facts["distinct"] < num_requests) & ~facts["is_prose"]
    # The number of an order is missing for most requests, and new for each of the others.
    num_known = sample.codes.groupby(sample.request).first().notna().sum()
    is_new_each_time = facts["distinct"] >= 0.9 * num_known.reindex(facts.index, fill_value=0)
    is_possible &= ~(is_new_each_time & (facts["known"] < 0.99))
    is_possible &= ~facts["system"]  # not a latency
    ids = [*facts[is_possible].sort_values("distinct", ascending=False).index]
    lasting = [column for column in ids if not is_session(sample, column)]
    others = facts.index[(facts["request"] == 1) & (facts["distinct"] > 1)]
    owned = {}
    for column in lasting:
        is_constant = sample.constant_within(column, others.drop(column)) == 1
        if is_constant.any():
            owned[column] = int(is_constant.sum())
    owners = [*owned]
    found = _finest(sample, owners)
    if found.rivals:
        # The item of a page, or the age of an account, has hardly any columns of its own.
        first, second, *_ = sorted(owners, key=lambda owner: owned[owner], reverse=True)
        return Found(first) if owned[first] >= 2 * owned[second] else found
    if not found.column:
        return Found("", tuple(ids))
    distinct = facts["distinct"]
    # A device is hardly finer than a user; and users with one request each prove nothing.
    close = [other for other in owners if distinct[other] > 0.5 * distinct[found.column]]
    is_sure = len(close) <= 1 and distinct[found.column] < 0.9 * num_requests
    return found if is_sure else Found("", tuple(dict.fromkeys((found.column, *close))))


def is_session(sample: Sample, column: str) -> bool:
    """Return whether the requests of each value follow each other closely, and are of one user."""
    facts = sample.facts
    is_coarser = facts["distinct"].between(_LEAST_OWNERS, 0.99 * facts["distinct"][column])
    users = facts.index[facts["is_id"] & (facts["request"] == 1) & is_coarser]
    if not (sample.constant_within(column, users) == 1).any():
        return False
    is_time = (facts["kind"] == "time") | (facts["unit"] != "")
    times = facts.index[is_time & (facts["request"] == 1) & (facts["distinct"] > 1)]
    for time in times:
        seconds = sample.seconds(time)
        span = seconds.max() - seconds.min()
        of_owners = pd.DataFrame({"owner": sample.codes[column], "seconds": seconds})
        of_requests = of_owners.groupby(sample.request).first()
        groups = of_requests.groupby("owner")["seconds"].agg(["count", "min", "max"])
        several = groups[groups["count"] > 1]
        # Most visits of a user may be single ones, but not nearly all.
        if len(several) and (several["max"] - several["min"]).quantile(0.9) <= _SESSION * span:
            return True
    return False


def find_time(sample: Sample) -> Found:
    """Find the only time of requests; the finest of several that contain each other."""
    facts = sample.facts
    is_time = (facts["kind"] == "time") | (facts["unit"] != "")
    is_possible = is_time & (facts["request"] == 1) & (facts["user"] != 1) & (facts["item"] != 1)
    is_possible &= (facts["known"] > 0.99) & (facts["distinct"] > 1)
    found = _finest(sample, [*facts.index[is_possible]])
    # A row is written some time after its request.
    others = [column for column in found.rivals if not facts["bookkeeping"][column]]
    return Found(others[0]) if len(others) == 1 else found


def find_version(sample: Sample, time: str) -> Found:
    """Find the only column whose values follow each other in time, as the versions of a model do.

    It may be that of a teacher that has no column yet. If none does, the only column that is called
    the version of a model.
    """
    facts = sample.facts
    columns = facts.index[_may_be_version(facts)]
    versions = [str(column) for column in columns if follow_in_time(sample, column, time)]
    if not versions:
        # Two versions may serve at the same time, a user each.
        is_called = facts["versions"] & facts["models"] & ~facts["early"]
        versions = [*facts.index[_may_be_version(facts) & is_called]]
    return Found(versions[0]) if len(versions) == 1 else Found("", tuple(versions))


def _may_be_version(facts: pd.DataFrame) -> pd.Series:
    may_differ = (facts["item"] != 1) & (facts["user"] != 1)
    return facts["is_few"] & ~facts["binary"] & may_differ


def follow_in_time(sample: Sample, column: str, time: str) -> bool:
    """Return whether each value of a column comes after the one before it, and none comes back.

    Versions of a model overlap while the next one is tried on a few requests.
    """
    times = sample.seconds(time).groupby(sample.codes[column])
    spans = pd.DataFrame({"start": times.quantile(0.05), "end": times.quantile(0.95)})
    spans = spans.sort_values("start")
    is_after = spans["start"].iloc[1:].to_numpy() >= spans["end"].iloc[:-1].to_numpy()
    return bool(len(spans) > 1 and is_after.all() and times.size().min() >= _LEAST_ONES)


def find_shown(sample: Sample) -> pd.Series | None:
    """Find the rows with a label: those of a column of 0 and 1 that others confirm; None if none.

    A column confirms by being known for the same rows, or by having one of few values in them.
    """
    masks = _masks(sample)
    labels = [mask for mask in masks if mask.is_label]
    if labels:
        return _shown_by_missing_labels(sample, masks, labels)
    return _shown_by_ones(sample, masks)


class _Mask(NamedTuple):
    """The rows in which a column is known, has one of few values, or a position."""

    column: str
    rows: pd.Series
    is_label: bool  # 0 and 1 where it is known


def _masks(sample: Sample) -> list[_Mask]:
    """Return the rows that each column of candidates sets apart."""
    facts = sample.facts
    is_of_candidate = (facts["request"] == 0) & (facts["item"] != 1) & (facts["user"] != 1)
    is_of_candidate &= ~facts["kind"].isin(["list", "other"])
    masks = []
    for column, facts_of_column in facts[is_of_candidate].iterrows():
        codes = sample.codes[column]
        if facts_of_column["known"] <= 0.99:
            is_label = bool(facts_of_column["binary"]) and codes.nunique() == 2
            masks.append(_Mask(str(column), codes.notna(), is_label))
        elif codes.nunique() <= 3:
            values = codes.dropna().unique()
            masks += [_Mask(str(column), codes == value, False) for value in values]
        elif facts_of_column["kind"] == "integer" and facts_of_column["low"] == NO_PLACE:
            masks.append(_Mask(str(column), sample.numbers[column] != NO_PLACE, False))
    return [mask for mask in masks if _splits_requests(mask.rows, sample.request)]


def _splits_requests(rows: pd.Series, request: pd.Series) -> bool:
    """Return whether most requests have some of the rows, but not most of their own."""
    shares = rows.groupby(request).mean()
    return bool(((shares > 0) & (shares < 1)).mean() > 0.5 and rows.mean() <= 0.9)


def _shown_by_missing_labels(
    sample: Sample, masks: list[_Mask], labels: list[_Mask]
) -> pd.Series | None:
    support = [_count_equal(label, masks) for label in labels]
    best = max(support)
    if best == 0 and (len(labels) > 1 or labels[0].rows.mean() > 0.5):
        return None
    # A label of few, such as that of a purchase after a click, is known for a part of the shown.
    likely = [label for label, count in zip(labels, support, strict=True) if count == best]
    labeled = max(likely, key=lambda label: label.rows.sum()).rows
    # The events of whole requests may be lost, whose candidates have positions.
    is_in_request = labeled.groupby(sample.request).transform("any")
    for mask in masks:
        if _is_equal(labeled, mask.rows & is_in_request) and counts_places(
            sample, mask.column, mask.rows
        ):
            return mask.rows
    return labeled


def _count_equal(mask: _Mask, masks: list[_Mask]) -> int:
    """Return how many other columns set the same rows apart."""
    equal = {
        other.column
        for other in masks
        if other.column != mask.column and _is_equal(mask.rows, other.rows)
    }
    return len(equal)


def _is_equal(rows: pd.Series, others: pd.Series) -> bool:
    return bool((rows ^ others).sum() <= _STRAY * min(rows.sum(), others.sum()))


def _shown_by_ones(sample: Sample, masks: list[_Mask]) -> pd.Series | None:
    """Return the fewest rows that two columns set apart and that have all ones of another.

    Those in a cart have all that is bought, too. So rows with a position come first.
    """
    facts = sample.facts
    binary = facts.index[may_be_label(facts) & (facts["known"] > 0.99) & (facts["request"] == 0)]
    possible = []
    for column in binary:
        ones = sample.numbers[column] == 1
        if ones.sum() < _LEAST_ONES:
            continue
        for mask in masks:
            has_ones = mask.column != column and (ones & ~mask.rows).mean() <= 0.001 * ones.mean()
            if has_ones and not _is_equal(ones, mask.rows):
                possible.append(mask)
    placed = [mask.rows for mask in possible if counts_places(sample, mask.column, mask.rows)]
    confirmed = [mask.rows for mask in possible if _count_equal(mask, masks) > 0]
    rows = placed or confirmed or [mask.rows for mask in possible]
    return min(rows, key=lambda mask: mask.sum(), default=None)


class FoundStage(NamedTuple):
    """The column of the stages, and the texts of each, as the config has them."""

    found: Found
    stages: dict[str, str]


def find_stage(sample: Sample) -> FoundStage:
    """Find the few texts some of which cover just the shown, and some the others with scores."""
    facts = sample.facts
    is_possible = facts["is_few"] & (facts["known"] > 0.99)
    is_possible &= (facts["request"] == 0) & (facts["item"] != 1)
    by_column = {}
    with_shown = []
    for column in map(str, facts.index[is_possible]):
        if stages := _stages_of(sample, column):
            by_column[column] = stages
        elif _texts_of_shown(sample, column):
            with_shown.append(column)
    if len(by_column) == 1:
        ((column, stages),) = by_column.items()
        return FoundStage(Found(column), stages)
    return FoundStage(Found("", tuple(by_column or with_shown)), {})


def _stages_of(sample: Sample, column: str) -> dict[str, str]:
    """Return the texts of each stage in a column, {} if its values do not fit."""
    shown = _texts_of_shown(sample, column)
    if not shown:
        return {}
    texts = sample.texts(column)
    if texts.str.contains(",").any():  # which separates texts in a config
        return {}
    others = [str(text) for text in texts.dropna().unique() if text not in shown]
    facts = sample.facts
    is_number = may_be_teacher(facts) & (facts["distinct"] >= _LEAST_OWNERS)
    scores = facts.index[is_number & _is_known_further(facts)]
    has_one_other = len(others) == 1
    if scores.empty and has_one_other:
        return {"shown": join(shown), "retrieved": join(others)}
    # One of these is a score; others may be missing at random.
    for score in scores:
        shares = sample.codes[score].notna().groupby(texts).mean()[others]
        passed = [text for text in others if shares[text] >= 0.3]
        retrieved = [text for text in others if shares[text] <= 0.02]
        is_complete = len(passed) + len(retrieved) == len(others)
        if is_complete and ((passed and retrieved) or has_one_other):
            stages = {"shown": shown, "passed": passed, "retrieved": retrieved}
            return {stage: join(named) for stage, named in stages.items() if named}
    return {}


def _texts_of_shown(sample: Sample, column: str) -> list[str]:
    """Return the texts of a column that cover just the shown candidates; [] if none do."""
    texts = sample.texts(column)
    shares = sample.shown.groupby(texts).mean()
    shown = [str(text) for text in shares.index[shares >= 1 - _STRAY]]
    return shown if _is_equal(texts.isin(shown), sample.shown) else []


def _is_known_further(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column is known for shown candidates and some of the others."""
    is_known_of_more = (facts["known_in"] >= 0.5) & (facts["known_out"] > 0.01)
    return is_known_of_more & (facts["known"] < 0.99) & (facts["known_out"] < facts["known_in"])


def find_passed(sample: Sample) -> FoundStage:
    """Find the flag of the passed: of all shown, and of others that have or top some score."""
    facts = sample.facts
    is_possible = facts["is_few"] & (facts["known"] > 0.99)
    is_possible &= (facts["request"] == 0) & (facts["item"] != 1) & (facts["user"] != 1)
    by_column = {}
    for column in map(str, facts.index[is_possible]):
        texts = sample.texts(column)
        shares = sample.shown.groupby(texts).mean()
        passed = [str(text) for text in shares.index[shares > _STRAY]]
        retrieved = [str(text) for text in shares.index.difference(passed)]
        rows = texts.isin(passed)
        covers_shown = (sample.shown & ~rows).sum() <= _STRAY * sample.shown.sum()
        has_comma = texts.str.contains(",").any()  # which separates texts in a config
        if retrieved and covers_shown and not has_comma and _are_passed(sample, rows):
            by_column[column] = {"retrieved": join(retrieved), "passed": join(passed)}
    if len(by_column) == 1:
        ((column, stages),) = by_column.items()
        return FoundStage(Found(column), stages)
    return FoundStage(Found("", tuple(by_column)), {})


def _are_passed(sample: Sample, rows: pd.Series) -> bool:
    """Return whether some score is known of these rows alone, or highest for them."""
    if not _splits_requests(rows, sample.request) or _is_equal(rows, sample.shown):
        return False
    facts = sample.facts
    scores = facts.index[may_be_score(facts) & varies_in_requests(facts) & (facts["user"] != 1)]
    known = sample.codes[scores].notna()
    is_known_of_them = (known[rows].mean() > 0.9) & (known[~rows].mean() <= _RARELY)
    orders_them = share_shown_first(sample.numbers[scores], sample.request, rows)
    return bool(is_known_of_them.any() or (orders_them >= _ORDERS_PASSED).any())


def find_position(sample: Sample) -> Found:
    """Find the whole numbers from 0 or 1 that differ among the shown candidates of a request.

    Candidates that were not shown have no number, or -1.
    """
    facts = sample.facts
    if not sample.shown.any():
        return Found()
    is_possible = may_count_places(facts) & varies_in_requests(facts) & facts["placed"]
    is_possible &= facts["distinct"] > 2
    is_possible &= facts["high"] <= sample.request.value_counts().max()
    shown = sample.request[sample.shown]
    fitting = [
        str(column)
        for column in facts.index[is_possible]
        if _hardly_repeats(sample.codes[column][sample.shown], shown)
    ]
    return Found(fitting[0]) if len(fitting) == 1 else Found("", tuple(fitting))


def find_incumbent(sample: Sample, used: Collection[str]) -> Found:
    """Find a score of all candidates that is highest for those that were passed."""
    facts, passed = sample.facts, sample.passed
    if not passed.any() or passed.all():
        return Found()
    # A name such as `early_score` rules out the final ranker, not the early one.
    is_possible = may_be_teacher(facts) | facts["early"]
    is_possible &= (facts["kind"] == "float") & (facts["user"] != 1) & varies_in_requests(facts)
    scores = facts.index[is_possible].difference([*used])
    # The scores of whole requests may be lost.
    known = sample.codes[scores].notna().groupby(sample.request).mean()
    scores = scores[(known.mean() > 0.95) & (known[known > 0].mean() > 0.99)]
    numbers = sample.numbers[scores]
    # The passed ones may be first by the smallest numbers, too: then these are no scores.
    orders_passed = share_shown_first(numbers, sample.request, passed) >= _ORDERS_PASSED
    ranks = numbers.groupby(sample.request).rank()
    is_higher = ranks[passed].mean() > ranks[~passed].mean()
    fitting = [*scores[orders_passed & is_higher]]
    return Found(fitting[0]) if len(fitting) == 1 else Found("", tuple(fitting))


def find_labels(sample: Sample) -> list[str]:
    """Return the columns of 0 and 1 that are known only where shown, or 1 only there."""
    facts = sample.facts
    if not sample.shown.any():
        return []
    varies_among_shown = (facts["ones_in"] > 0) & (facts["ones_in"] < 1)
    is_one_of_shown = (facts["known"] > 0.99) & (facts["ones_out"] <= 0.001 * facts["ones_in"])
    is_label = facts["only_shown"] | is_one_of_shown
    return [*facts.index[may_be_label(facts) & varies_among_shown & is_label]]


def find_teacher(
    sample: Sample, labels: dict[str, str], settled: Collection[str]
) -> dict[str, str]:
    """Return the score of each task: that which predicts its label best; {} if it is not clear.

    Only shown candidates count: a label of the others may be 0, whatever their score. If there are
    more scores than tasks, as with a blend of them, or fewer, or if names settle some, those called
    after a label are clear.

    Args:
      sample: of the log.
      labels: task -> its column, for the tasks without a teacher.
      settled: columns of the teacher's other tasks.
    """
    facts = sample.facts.drop([*settled])
    is_possible = may_be_teacher(facts) & may_be_score(facts) & _is_known_further(facts)
    probabilities = [*facts.index[is_possible & is_probability(facts)]]
    scores = probabilities or [*facts.index[is_possible]]
    if settled or len(scores) != len(labels):
        return _called_after_labels(scores, labels)
    # The probabilities of a ranker may be far from the rates of the labels.
    losses = (_log_loss, _negative_correlation) if probabilities else (_negative_correlation,)
    for loss in losses:
        best = _best_scores(sample, scores, labels, loss)
        if len({*best.values()}) == len(labels):
            return best
    return _called_after_labels(scores, labels)


def find_score_of_order(
    sample: Sample, labels: Mapping[str, str], position: str, possible: Sequence[str]
) -> dict[str, str]:
    """Return the score that orders the shown by position, for the label that it ranks best.

    Labels of different rates cannot be compared by a loss, so the area under the ROC curve decides,
    less its standard error: that of a rare label may be large by chance.
    """
    shown = sample.shown
    request = sample.request[shown]
    places = sample.numbers.loc[shown, position].groupby(request).rank()
    ranks = sample.numbers.loc[shown, [*possible]].groupby(request).rank()
    agreement = -ranks.corrwith(places).fillna(0).sort_values()
    best, *others = [*agreement.items(), ("", 0.0)]
    if best[1] < max(_ORDERS_SHOWN, _CLEARLY * others[0][1] if others else 0):
        return {}
    score = str(best[0])
    numbers = sample.numbers.loc[shown, [score, *labels.values()]]
    areas = {task: _area_at_least(numbers[score], numbers[label]) for task, label in labels.items()}
    return {max(areas, key=lambda task: areas[task]): score}


def _area_at_least(score: pd.Series, label: pd.Series) -> float:
    """Return the area under the ROC curve less its standard error.

    The area is Mann-Whitney's U over its largest value, and the error that of as many independent
    pairs as there are labels of the rarer kind.
    """
    is_known = score.notna() & label.notna()
    is_one = label[is_known] == 1
    ones, zeros = int(is_one.sum()), int((~is_one).sum())
    if not ones or not zeros:
        return 0.0
    ranks = score[is_known].rank()
    area = float((ranks[is_one].sum() - ones * (ones + 1) / 2) / (ones * zeros))
    return area - (area * (1 - area) / min(ones, zeros)) ** 0.5


def _best_scores(
    sample: Sample,
    scores: Sequence[str],
    labels: Mapping[str, str],
    loss: Callable[[pd.Series, pd.Series], float],
) -> dict[str, str]:
    """Return the score with the least loss of each label, of those that correlate with it."""
    best = {}
    for task, label in labels.items():
        numbers = sample.numbers.loc[sample.shown, [label, *scores]]
        fitting = [score for score in scores if correlates(numbers[[score, label]])]
        losses = {score: loss(numbers[score], numbers[label]) for score in fitting}
        if losses:
            best[task] = min(losses, key=lambda score: losses[score])
    return best


def _called_after_labels(scores: Sequence[str], labels: Mapping[str, str]) -> dict[str, str]:
    """Return the only score whose name contains a word of the label's, as pClk does of isClk.

    If none does, the ends of words may differ, as those of p_purchase and purchased.
    """
    found = {}
    for task, label in labels.items():
        words_of_label = without(label, "affixes")
        for num_letters in range(_LONGEST_ENDING + 1):
            stems = [word[: len(word) - num_letters] for word in words_of_label]
            stems = [stem for stem in stems if len(stem) >= _LEAST_LETTERS]
            called = [score for score in scores if any(stem in score.lower() for stem in stems)]
            if len(called) == 1:
                found[task] = called[0]
            if called:
                break
    return found if len({*found.values()}) == len(found) else {}


def correlates(numbers: pd.DataFrame) -> bool:
    """Return True if two columns correlate by at least three standard errors."""
    known = numbers.dropna()
    return bool(known.corr().iat[0, 1] * len(known) ** 0.5 >= 3)


def _log_loss(score: pd.Series, label: pd.Series) -> float:
    is_known = score.notna() & label.notna()
    probability = score[is_known].clip(1e-4, 1 - 1e-4)
    positive = label[is_known] == 1
    return float(-np.log(np.where(positive, probability, 1 - probability)).mean())


def _negative_correlation(score: pd.Series, label: pd.Series) -> float:
    return -float(score.corr(label))


# Role -> how to find it, in the order of the search by name.
OWNERS: dict[str, Callable[[Sample], Found]] = {
    "request": find_request,
    "item": find_item,
    "user": find_user,
    "time": find_time,
}
