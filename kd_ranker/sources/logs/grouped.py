"""Rows of a log as requests: whose they are, when, in which split, and their candidates in order.

The order of the log's rows decides one thing: the first of two rows of an item counts.
"""

from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
from ibis import _
from jaxtyping import Int64

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.reasons import Reason
from kd_ranker.sources.logs.typed import weight_of_labels

# Seconds between the first and the last row of a request.
_LONGEST = 3600
# Above every row of a file: `at` is the place of a row in the log.
_ROWS_OF_A_FILE = 2**40


class Cutoffs(NamedTuple):
    """The earliest times of a validation and of a test request."""

    validation: int
    test: int


class Grouped(NamedTuple):
    """The rows of a log as requests, and those that are left out.

    Attributes:
      requests: a row a request: `request`, `number` (from 0, by split, time and id), `split` (its
        place in `SPLITS`), `time`, `user`, `moved` (whether its rows have several times), `users`
        (how many they have), and `file` and `row` of its first row.
      candidates: a row a candidate that is used: the columns of `typed`, and `number`, `at` (the
        request's time) and `split`.
      rejected: `file`, `row`, `place`, `entries` and `reason` of the others.
      cutoffs: with a split by time.
    """

    requests: ir.Table
    candidates: ir.Table
    rejected: ir.Table
    cutoffs: Cutoffs | None


def group(
    engine: Engine, layout: LogLayout, rows: ir.Table, without_any: ir.Table | None
) -> Grouped:
    """Makes requests of the rows of `typed`; `without_any` are those that `unfold` rejects."""
    rows = engine.keep("rows", rows)
    times = rows.filter(rows.request.notnull() & rows.time.notnull())
    times = times.group_by("request").agg(at=times.time.min(), last=times.time.max())
    times = engine.keep("times", times)
    # Ids that begin again in another month, say: neither time nor labels are of one request.
    apart = engine.keep("apart", times.filter(times["last"] - times["at"] > _LONGEST))
    good = rows.filter(rows.reason == 0)
    if layout.split == "column":
        _check_splits(engine, layout, good)
    too_long = []
    if engine.count(apart):
        too_long = [_rejected(good.semi_join(apart, "request"), Reason.SEVERAL_HOURS)]
        good = good.anti_join(apart, "request")
    # Those that lose all of their rows count as well: a fault must not move the others.
    cutoffs = _cutoffs(engine, layout, times) if layout.split == "time" else None
    requests = _requests(engine, layout, good, times, cutoffs)
    owners = requests.select("request", "number", "split", "users", owner="user", at="time")
    shared = good.join(owners.filter(owners.users > 1), "request")
    rejected = [
        _rejected(rows.filter(rows.reason > 0)),
        *too_long,
        _rejected(shared.filter(shared.user != shared.owner), Reason.SEVERAL_USERS),
    ]
    if without_any is not None:
        rejected.append(_rejected(without_any.mutate(place=ibis.literal(-1, "int64"))))
    used, twice = _once(engine, layout, good, owners)
    # Only now: of two rows of an item each may have the label that the other lacks.
    used = used.mutate(label_weight=weight_of_labels(used, layout))
    used, beyond = _at_most(engine, layout, engine.keep("candidates", used))
    rejected += [*twice, *beyond]
    return Grouped(requests, used, engine.keep("rejected", ibis.union(*rejected)), cutoffs)


def counts_by_reason(engine: Engine, grouped: Grouped) -> Int64[np.ndarray, "reasons"]:
    """The number of candidates that each reason has cost; index 0 is no reason."""
    rejected = grouped.rejected
    counted = engine.fetch(rejected.group_by("reason").agg(entries=rejected.entries.sum()))
    counts = np.zeros(max(Reason) + 1, np.int64)
    counts[counted["reason"].to_numpy()] = list(map(int, counted["entries"].to_pylist()))
    return counts


def count_steps_back(engine: Engine, requests: ir.Table) -> int:
    """The number of requests that begin in the log behind one of a later time."""
    before = requests.time.lag().over(order_by=["file", "row"])
    steps = requests.mutate(before=before)
    return engine.count(steps.filter(steps.time < steps.before))


def _requests(
    engine: Engine, layout: LogLayout, good: ir.Table, times: ir.Table, cutoffs: Cutoffs | None
) -> ir.Table:
    """The requests of `Grouped`: each is of the user of most of its rows, or of the least id."""
    by_user = good.group_by("request", "user").agg(
        rows=_.count(), first=(_.file * _ROWS_OF_A_FILE + _.row).min(), last_time=_.time.max(),
        first_time=_.time.min(),
        **({"logged_split": _.logged_split.min()} if layout.split == "column" else {}),
    )  # fmt: skip
    most = ibis.row_number().over(group_by="request", order_by=[ibis.desc("rows"), "user"])
    by_user = by_user.mutate(place=most)
    requests = by_user.group_by("request").agg(
        user=_.user.max(where=_.place == 0),
        first=_.first.max(where=_.place == 0),
        users=_.count(),
        first_time=_.first_time.max(where=_.place == 0),
        last_time=_.last_time.max(where=_.place == 0),
        **({"logged_split": _.logged_split.min()} if layout.split == "column" else {}),
    )
    requests = engine.keep("users_of_requests", requests.join(times, "request"))
    requests = requests.mutate(split=_split(layout, requests, cutoffs))
    number = ibis.row_number().over(order_by=["split", "at", "request"])
    moved = (requests.first_time != requests.at) | (requests.last_time != requests.at)
    return engine.keep(
        "requests",
        requests.select(
            "request",
            "user",
            "users",
            "split",
            time=requests["at"],
            moved=moved,
            number=number,
            file=requests["first"] // _ROWS_OF_A_FILE,
            row=requests["first"] % _ROWS_OF_A_FILE,
        ),
    )


def _check_splits(engine: Engine, layout: LogLayout, good: ir.Table) -> None:
    """Raises UserError for requests without a split, or with rows of different splits."""
    splits = good.group_by("request").agg(low=_.logged_split.min(), high=_.logged_split.max())
    bad = splits.filter((splits.low < 0) | (splits.low != splits.high))
    if number := engine.count(bad):
        (example,) = engine.fetch(bad.order_by("request").limit(1))["request"].to_pylist()
        raise UserError(
            f"data.columns.split: in column {layout.columns['split']!r}, {number:,} requests, such "
            f"as {example!r}, do not have one of {', '.join(SPLITS)} in all of their rows"
        )


def _rejected(rows: ir.Table, reason: Reason | None = None) -> ir.Table:
    """The rows as records of what is rejected; `reason` is that of all of them."""
    why = rows.reason if reason is None else ibis.literal(int(reason))
    entries = rows.entries if "entries" in rows.columns else ibis.literal(1)
    return rows.select(
        *("file", "row", "place"), entries=entries.cast("int64"), reason=why.cast("int8")
    )


_PLACE = ("file", "row", "place")


def _of_owners(rows: ir.Table, owners: ir.Table) -> ir.Table:
    """The rows of each request's own user, with what `owners` says of the request."""
    joined = rows.join(owners, "request")
    joined = joined.filter(joined.user == joined.owner)
    unused = {"request", "users", "owner", "user", "reason", "logged_split"}
    return joined.drop(*unused & {*joined.columns})


def _once(
    engine: Engine, layout: LogLayout, good: ir.Table, owners: ir.Table
) -> tuple[ir.Table, list[ir.Table]]:
    """The rows of owners with each item once a request, on which all its positive labels count.

    It came as far as any of its rows says, to the best position of any, with the largest weight,
    incumbent and propensity.
    """
    rows = _of_owners(good, owners)
    # Of any user: to join all rows with their requests takes longer than to look at some in vain.
    again = good.group_by("request", "item").agg(times=_.count()).filter(_.times > 1)
    again = engine.keep("again", again)
    if not engine.count(again):
        return rows, []
    turn = ibis.row_number().over(group_by=["number", "item"], order_by=_PLACE)
    several = _of_owners(good.semi_join(again, ["request", "item"]), owners)
    several = engine.keep("several", several.mutate(turn=turn))
    facts = [name for name in ("incumbent", "propensity") if name in rows.columns]
    most = [*(f"label:{task}" for task in layout.labels), "label_weight", "stage", *facts]
    joint = several.group_by("number", "item").agg(
        **{f"joint {name}": several[name].max() for name in most},
        **{"joint position": several.position.min()},
    )
    merged = [f"joint {name}" for name in (*most, "position")]
    known = several.join(joint, ["number", "item"]).select(*_PLACE, "turn", *merged)
    once = rows.left_join(known, _PLACE)
    once = once.filter(ibis.coalesce(once.turn, 0) == 0)
    values = {
        name: ibis.coalesce(once[f"joint {name}"], once[name]) for name in (*most, "position")
    }
    twice = _rejected(several.filter(several.turn > 0), Reason.DUPLICATE_ITEM)
    return once.mutate(**values).select(rows.columns), [twice]


def _at_most(engine: Engine, layout: LogLayout, rows: ir.Table) -> tuple[ir.Table, list[ir.Table]]:
    """The first candidates of each request in funnel order, `layout.retrieved` at most."""
    large = rows.group_by("number").agg(size=_.count()).filter(_.size > layout.retrieved)
    large = engine.keep("large", large)
    if not engine.count(large):
        return rows, []
    place = ibis.row_number().over(group_by="number", order_by=funnel_order(rows))
    ranked = rows.semi_join(large, "number").mutate(rank=place)
    beyond = engine.keep("beyond", ranked.filter(_.rank >= layout.retrieved))
    few = engine.keep("first_candidates", rows.anti_join(beyond, _PLACE))
    return few, [_rejected(beyond, Reason.BEYOND_RETRIEVED)]


def funnel_order(rows: ir.Table) -> list[ir.Value]:
    """The order of a request's candidates: by stage, position, and then the item's id."""
    position = ibis.coalesce(rows.position, float("inf"))
    return [ibis.desc(rows.stage), position, rows.item]


def _split(layout: LogLayout, requests: ir.Table, cutoffs: Cutoffs | None) -> ir.IntegerValue:
    """The place in `SPLITS` of the split of each request."""
    train, validation, test = (ibis.literal(SPLITS.index(of), "int8") for of in SPLITS)
    if not layout.split:
        return test
    if layout.split == "column":
        return requests["logged_split"]
    if layout.split == "time":
        # Without cutoffs there are no requests.
        first = cutoffs or Cutoffs(0, 0)
        return ibis.cases(
            (requests["at"] >= first.test, test),
            (requests["at"] >= first.validation, validation),
            else_=train,
        )
    text = requests[layout.split].cast("string")
    digest = (ibis.literal(f"{layout.seed} ") + text).hexdigest("md5")
    # The test's share comes first, so that it does not depend on the validation's.
    return ibis.cases(
        (digest < _share(layout.test_share), test),
        (digest < _share(layout.test_share + layout.validation_share), validation),
        else_=train,
    )


def _share(share: float) -> str:
    """The text below which such a share of all digests lies."""
    return f"{int(share * 2**52):013x}"


def _cutoffs(engine: Engine, layout: LogLayout, times: ir.Table) -> Cutoffs | None:
    time = engine.fetch(times.select("at"))["at"].to_numpy()
    return time_cutoffs(time, layout.validation_share, layout.test_share) if len(time) else None


def time_cutoffs(
    time: Int64[np.ndarray, "n"], validation_share: float, test_share: float
) -> Cutoffs | None:
    """The times that end training and validation; None if there are less than three seconds.

    The test begins with the first of the last `test_share` requests, the validation with the first
    of the last `validation_share` + `test_share`. Requests of the same second stand on the same
    side, so the shares are met as nearly as seconds allow, and each split has at least a second.

    >>> time_cutoffs(np.array([5, 1, 2, 3, 4]), 0.2, 0.4)
    Cutoffs(validation=3, test=4)
    """
    ordered = np.sort(time)
    seconds = np.unique(ordered)
    if len(seconds) < len(SPLITS):
        return None

    def first_of_last(share: float) -> int:
        return int(ordered[min(len(ordered) - 1, len(ordered) - round(share * len(ordered)))])

    test = max(first_of_last(test_share), int(seconds[2]))
    last_before = int(seconds[np.searchsorted(seconds, test) - 1])
    validation = max(first_of_last(validation_share + test_share), int(seconds[1]))
    return Cutoffs(min(validation, last_before), test)
