"""Judgements by the names of columns: the roles in a log that each may have."""

import keyword
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

# Names that a column of each role goes by; the first is the template's. They match however they
# are written: `request_id`, `requestId`, `REQUESTID`, `request_ids`.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "request": (
        "request_id", "request", "req_id", "req", "rid", "query_id", "qid", "impression_id",
        "slate_id", "list_id", "page_id", "page_view_id", "pageview_id", "feed_id", "search_id",
        "auction_id", "trace_id", "session_request_id", "request_uuid", "session_id",
    ),
    "user": (
        "user_id", "user", "uid", "member_id", "account_id", "customer_id", "visitor_id",
        "viewer_id", "reader_id", "listener_id", "profile_id", "user_uuid", "user_key", "device_id",
    ),
    "item": (
        "item_id", "item", "iid", "video_id", "vid", "photo_id", "pid", "product_id", "doc_id",
        "document_id", "post_id", "article_id", "news_id", "ad_id", "creative_id", "content_id",
        "movie_id", "track_id", "song_id", "note_id", "job_id", "listing_id", "sku", "asin",
        "candidate_id", "candidate", "target_id", "entity_id", "item_uuid", "item_key", "goods_id",
    ),
    "time": (
        "time", "timestamp", "ts", "request_time", "request_timestamp", "request_ts", "time_ms",
        "time_s", "time_us", "timestamp_ms", "event_time", "event_timestamp", "event_ts",
        "datetime", "date_time", "server_time", "log_time", "requested_at", "created_at", "date",
    ),
    "stage": ("stage", "funnel_stage", "funnel", "funnel_level", "status", "state", "stage_name"),
    "position": (
        "position", "pos", "display_position", "shown_position", "show_position", "slot",
        "slot_position", "impression_position", "display_rank", "rank", "item_position",
        "rank_position", "feed_position",
    ),
    "label_weight": (
        "label_weight", "sample_weight", "importance_weight", "example_weight", "ips_weight",
        "inverse_propensity", "weight",
    ),
    "teacher_version": (
        "teacher_version", "model_version", "ranker_version", "final_ranker_version",
        "teacher_model", "teacher_model_version", "ranking_model", "ranking_model_version",
        "ranker", "model_id", "model_name",
    ),
    "teacher_weight": ("teacher_weight", "teacher_valid", "teacher_logged", "teacher_mask"),
}  # fmt: skip

# Columns that say of each candidate only whether it was shown.
SHOWN_NAMES = (
    "shown", "is_shown", "was_shown", "exposed", "is_exposed", "exposure", "is_exposure",
    "impressed", "impression", "is_impression", "displayed", "is_displayed", "served", "is_show",
    "show",
)  # fmt: skip

# Names of the values of a stage column, from the widest stage to the narrowest.
STAGE_WORDS: dict[str, tuple[str, ...]] = {
    "retrieved": ("retrieved", "retrieval", "recall", "recalled", "candidate", "matched", "match"),
    "passed": (
        "passed", "pass", "prerank", "preranked", "preranking", "early", "early_rank",
        "early_ranked", "coarse", "coarse_ranked", "rank", "ranked", "ranking", "scored", "rerank",
        "reranked", "kept",
    ),
    "shown": (
        "shown", "show", "displayed", "display", "exposed", "exposure", "impression", "impressed",
        "served", "delivered", "viewed", "realshow",
    ),
}  # fmt: skip

KNOWN_TASKS = frozenset((
    "click", "like", "share", "watch", "long_view", "long_watch", "view", "effective_view",
    "valid_view", "valid_play", "play", "purchase", "buy", "order", "pay", "cart", "add_to_cart",
    "add_cart", "follow", "subscribe", "comment", "reply", "save", "favorite", "favourite",
    "collect", "bookmark", "install", "download", "conversion", "convert", "forward", "repost",
    "retweet", "finish", "complete", "engage", "engagement", "upvote", "apply", "contact",
    "profile_enter", "enter_profile", "listen", "read", "open", "skip", "dislike", "hide",
    "report", "block", "downvote", "not_interested", "unfollow", "hate",
))  # fmt: skip
UNWANTED = frozenset((
    "skip", "dislike", "hide", "report", "block", "downvote", "not_interested", "unfollow", "hate",
))  # fmt: skip

_LABEL_AFFIXES = frozenset(
    ("is", "has", "did", "was", "label", "y", "flag", "event", "target", "action")
)
_TEACHER_WORDS = frozenset(("teacher", "final", "ranker"))
_OUTPUT_WORDS = frozenset(
    ("probability", "prob", "proba", "score", "pred", "predicted", "prediction", "p", "model")
)
_PREDICTIONS = frozenset(("logit", "pred", "predicted", "prediction", "prob", "probability"))
_RANK_WORDS = frozenset(("rank", "ranking", "position", "order"))
# Rates that models predict are called after themselves: pctr is the probability of a click.
_RATES = {
    "ctr": ("click",),
    "cvr": ("conversion", "convert", "purchase", "buy", "order"),
    "ltr": ("like",),
    "wtr": ("follow", "watch"),
    "ftr": ("forward",),
    "lvtr": ("long_view",),
}

_AFTERWARDS = frozenset(
    ("dwell", "stay", "completion", "feedback", "outcome", "reward", "gmv", "revenue", "rating")
)
_USE = frozenset(("watch", "watched", "play", "played", "view", "viewed", "read", "listen"))
_AMOUNT = frozenset(
    ("time", "duration", "ratio", "second", "sec", "ms", "percent", "pct", "rate", "length")
)

_QUANTITIES = frozenset((
    "count", "cnt", "num", "number", "n", "total", "sum", "price", "cost", "amount", "age",
    "length", "duration", "second", "sec", "ms", "day", "year", "month", "score", "rate", "ratio",
    "ctr", "view", "size", "width", "height", "weight", "distance", "popularity", "quality",
    "follower", "fan", "level", "rank", "avg", "mean", "log",
))  # fmt: skip
_IDENTIFIERS = frozenset((
    "id", "uuid", "key", "code", "hash", "category", "cat", "type", "genre", "tag", "topic",
    "brand", "author", "country", "city", "region", "zip", "zipcode", "language", "lang", "channel",
    "device", "os", "platform", "gender", "segment", "cluster", "bucket", "sku", "tab", "index",
    "idx", "no",
))  # fmt: skip
_HISTORIES = frozenset(
    ("history", "hist", "recent", "last", "seq", "sequence", "behavior", "behaviour", "past")
)
_OWNERS: dict[str, frozenset[str]] = {
    "user": frozenset(("user", "member", "viewer", "visitor", "customer", "account", "u")),
    "item": frozenset((
        "item", "video", "photo", "product", "doc", "document", "post", "article", "news", "ad",
        "content", "movie", "track", "song", "author", "creator", "seller", "i",
    )),
    "context": frozenset((
        "request", "context", "hour", "weekday", "dow", "device", "os", "platform", "network",
        "session", "page", "query", "surface", "tab", "app", "browser", "c",
    )),
}  # fmt: skip


def tokens_of(name: str) -> tuple[str, ...]:
    """The words of a name, in lower case and the singular.

    >>> tokens_of("lastItemIDs"), tokens_of("item.views_7d")
    (('last', 'item', 'id'), ('item', 'view', '7d'))
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return tuple(_singular(word) for word in re.split(r"[\W_]+", spaced.lower()) if word)


def _singular(word: str) -> str:
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is", "os"))
    return word[:-1] if is_plural and len(word) > 2 else word


def _joined(name: str) -> str:
    return "".join(tokens_of(name))


def match(name: str, synonyms: Sequence[str]) -> int:
    """2 where `name` is one of `synonyms`, 1 where it ends in one of several words, else 0.

    >>> match("VideoID", ("item_id", "video_id")), match("first_video_id", ("video_id",))
    (2, 1)
    >>> match("item_count", ("item_id", "item"))
    0
    """
    if _joined(name) in map(_joined, synonyms):
        return 2
    words = tokens_of(name)
    endings = [tokens_of(synonym) for synonym in synonyms]
    return int(any(len(ending) > 1 and words[-len(ending) :] == ending for ending in endings))


def stage_of_value(value: str) -> str | None:
    """The stage that a value of a stage column names, if it does.

    >>> stage_of_value("PRE_RANKED"), stage_of_value("red")
    ('passed', None)
    """
    for stage, words in STAGE_WORDS.items():
        if match(value, words) == 2:
            return stage
    return None


def _stem(word: str) -> str:
    """`clicked` -> `click`, `liked` -> `like`; other words as they are."""
    for stem in (word[:-2], word[:-1]) if word.endswith("ed") else ():
        if stem in KNOWN_TASKS:
            return stem
    return word


def task_of_label(name: str) -> tuple[str, bool]:
    """The task that a label column may stand for, and True if its name is a known one.

    >>> task_of_label("is_clicked"), task_of_label("label_long_view"), task_of_label("f7")
    (('click', True), ('long_view', True), ('f7', False))
    """
    words = [_stem(word) for word in tokens_of(name) if word not in _LABEL_AFFIXES]
    for task in ("_".join(words), "_".join(words[1:]) if words[:1] == ["user"] else ""):
        if task in KNOWN_TASKS:
            return task, True
    # `longview`, without a word's end to see.
    for task in sorted(KNOWN_TASKS):
        if "".join(words) == task.replace("_", ""):
            return task, True
    return identifier("_".join(words) or name), False


def is_output_of_model(name: str) -> bool:
    """True for the name of an output of a ranker, which foretells a task.

    >>> is_output_of_model("final_score"), is_output_of_model("p_like"), is_output_of_model("pctr")
    (True, True, True)
    >>> is_output_of_model("retrieval_score")
    False
    """
    words = set(tokens_of(name))
    is_scored_task = bool(words & _OUTPUT_WORDS) and any(
        _stem(word) in KNOWN_TASKS for word in words
    )
    is_output = bool(words & (_TEACHER_WORDS | _PREDICTIONS)) or is_scored_task
    return is_output or _rate_tasks(name) != ()


def is_score(name: str) -> bool:
    """True for the name of some model's output, whichever it is."""
    return bool(set(tokens_of(name)) & (_OUTPUT_WORDS | _RANK_WORDS))


def _rate_tasks(name: str) -> tuple[str, ...]:
    joined = _joined(name)
    return next((tasks for rate, tasks in _RATES.items() if joined.endswith(f"p{rate}")), ())


def teacher_match(name: str, task: str, is_rank: bool = False) -> int:
    """Score of a name for the teacher's column of a task; 0 if it does not name the task.

    >>> teacher_match("teacher_probability_like", "like"), teacher_match("like_score", "like")
    (3, 2)
    >>> teacher_match("pctr", "click"), teacher_match("like", "like"), teacher_match("f3", "like")
    (2, 0, 0)
    >>> teacher_match("final_rank", "like", is_rank=True)
    1
    """
    words = tokens_of(name)
    outputs = _RANK_WORDS if is_rank else _OUTPUT_WORDS
    rest = [_stem(word) for word in words if word not in _TEACHER_WORDS | outputs]
    is_teacher = bool(_TEACHER_WORDS & set(words))
    if len(rest) == len(words) and task not in _rate_tasks(name):
        glued = _joined(name) == f"p{''.join(tokens_of(task))}"
        return 2 if glued and not is_rank else 0
    of_task = "".join(rest) == "".join(tokens_of(task)) or task in _rate_tasks(name)
    if of_task:
        return 3 if is_teacher else 2
    return int(is_rank and is_teacher and not rest)


def is_known_afterwards(name: str) -> bool:
    """True for the name of something that users do, beyond the 0 or 1 of a label.

    >>> is_known_afterwards("dwell_ms"), is_known_afterwards("watchTime")
    (True, True)
    >>> is_known_afterwards("duration")
    False
    """
    words = set(tokens_of(name))
    glued = any(_joined(name) == f"{use}{amount}" for use in _USE for amount in _AMOUNT)
    return bool(words & _AFTERWARDS) or bool(words & _USE and words & _AMOUNT) or glued


def is_quantity(name: str) -> bool:
    """True if a name says that values are amounts."""
    return bool(set(tokens_of(name)) & _QUANTITIES) and not is_identifier(name)


def is_identifier(name: str) -> bool:
    """True if a name says that values are names, even if they are numbers."""
    return bool(set(tokens_of(name)[-1:]) & _IDENTIFIERS)


def is_history(name: str) -> bool:
    """True if a name says that a list holds earlier events of a user."""
    return bool(set(tokens_of(name)) & _HISTORIES)


def owner_of(name: str) -> str | None:
    """The owner that a name tells: user, item or context, by its first such word."""
    for word in tokens_of(name):
        for owner, words in _OWNERS.items():
            if word in words:
                return owner
    return None


def identifier(name: str) -> str:
    """`name` as a key of a config: ASCII letters, digits and underscores.

    >>> identifier("item.views (7d)"), identifier("7d"), identifier("items"), identifier("class")
    ('item_views_7d', 'c_7d', 'items_', 'class_')
    """
    text = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "column"
    if text[0].isdigit():
        text = f"c_{text}"
    # A key that is a method's name could not be reached with a dot.
    return f"{text}_" if keyword.iskeyword(text) or hasattr(ConfigDict, text) else text
