"""The text of a first config, to fit on a screen."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kd_ranker.sources.logs.infer.features import InferredFeature, InferredFeatures, LeftOut
from kd_ranker.sources.logs.infer.guess import CHECK, Guess

_WIDTH = 96  # of a line without its indent
_TEMPLATE = '''"""A first config for {name}, inferred from {rows:,} rows."""

from ml_collections import ConfigDict

from kd_ranker import configs
from kd_ranker.configs.sweeps.methods import compare_methods


def get_config(variant: str = "") -> ConfigDict:
    """The template with the columns of this log; confirm or edit each line below a CHECK."""
    config = configs.parquet(variant)
    data = config.data
{body}
    return config


def sweep(config: ConfigDict, variant: str = ""):
    """The methods to compare, with three seeds each; add rates, weights or losses."""
    return compare_methods({arguments})
'''


class _Block(NamedTuple):
    """Keys of a section that are written together."""

    section: str
    start: str
    end: str


_OF_LOG = (
    _Block("data.columns", "data.columns = configs.columns(", ")"),
    _Block("data.stages", "data.stages = dict(", ")"),
    _Block("data.labels", "data.labels = {", "}"),
    _Block("data.teacher", "data.teacher = {", "}"),
)
_OF_FUNNEL = _Block("funnel", "config.funnel.update(", ")")
_IN_BLOCKS = tuple(f"{block.section}." for block in (*_OF_LOG, _OF_FUNNEL))
# Those that `compare_methods` tries by default, without the ones that take probabilities.
_LOSSES_OF_ORDER = 'losses=("softmax", "topk")'
_OWNERS = ("user", "context", "item", "candidate")


def text_of_config(
    name: str,
    num_rows: int,
    guesses: Mapping[str, Guess],
    inferred: InferredFeatures,
    teacher_doubt: str,
    has_unshown: bool,
) -> str:
    """Return the text of a config file.

    Args:
      name: of the log.
      num_rows: of the sample.
      guesses: by key of the config, those of the log first.
      inferred: the columns without a role.
      teacher_doubt: names further columns that may be the teacher; "" for none.
      has_unshown: whether some candidates are known to be shown, and others not to be: only then
        can students learn from stages.
    """
    single = {key: guess for key, guess in guesses.items() if not key.startswith(_IN_BLOCKS)}
    features, of_log, of_config = [], [], []
    for key, guess in single.items():
        if key.startswith("data.features."):
            features += _assignment(key, guess)
        elif key.startswith("data."):
            of_log += _assignment(key, guess)
        else:
            of_config += _assignment(f"config.{key}", guess)
    if "teacher.source" not in guesses:
        of_config.append("config.teacher.source = 'logged' if data.teacher else 'live'")
    for block in _OF_LOG:
        doubt = teacher_doubt if block.section == "data.teacher" else ""
        of_log += _block(block, guesses, doubt)
    of_config += _block(_OF_FUNNEL, guesses)
    lines = [
        *of_log,
        *_features(inferred.features),
        *features,
        *_left_out(inferred.left_out),
        *of_config,
    ]
    body = "\n".join(f"    {line}" for line in lines)
    arguments = ["rates=(1e-2,)"]
    if not has_unshown:
        arguments.append("stages=False")
    signal = guesses.get("data.teacher_signal", Guess("probability"))
    if signal.value != "probability":
        arguments.append(_LOSSES_OF_ORDER)
    return _TEMPLATE.format(name=name, rows=num_rows, body=body, arguments=", ".join(arguments))


def _assignment(key: str, guess: Guess) -> list[str]:
    """Return an assignment, with the reason next to it and the doubt above."""
    behind = f"  # {guess.why}" if guess.why else ""
    code = _code(guess.value)
    code[0] = f"{key} = {code[0]}"
    code[-1] += behind
    return [*_check(guess), *code]


def _code(value: Any) -> list[str]:
    """Return the code of a value: a line, or several of a SELECT."""
    if not isinstance(value, str) or "\n" not in value:
        return [repr(value)]
    raw = "r" if "\\" in value else ""
    return [f'{raw}"""', *value.splitlines(), '"""']


def _check(guess: Guess) -> list[str]:
    return [f"# {CHECK}{guess.check}"] if guess.check else []


def _block(block: _Block, guesses: Mapping[str, Guess], doubt: str = "") -> list[str]:
    """Return the assignment of a section: one line, or one for each key if their doubts differ.

    A doubt about the section itself is above it.
    """
    section = f"{block.section}."
    entries = {
        key.removeprefix(section): guess
        for key, guess in guesses.items()
        if key.startswith(section)
    }
    if block.section == "data.stages" and not entries:
        return []
    codes = {
        name: f"{name!r}: {guess.value!r}" if block.end == "}" else f"{name}={guess.value!r}"
        for name, guess in entries.items()
    }
    line = f"{block.start}{', '.join(codes.values())}{block.end}"
    above = _check(Guess("", "", doubt))
    doubts = {guess.check for guess in entries.values()}
    has_one_doubt = len(doubts) <= 1 or block.section in ("data.stages", "funnel")
    if len(line) <= _WIDTH and has_one_doubt:
        return [*above, *(f"# {CHECK}{doubt}" for doubt in doubts if doubt), line]
    inside = []
    for name, guess in entries.items():
        inside += [*_check(guess), f"{codes[name]},"]
    return [*above, block.start, *(f"    {line}" for line in inside), block.end]


def _features(features: Sequence[InferredFeature]) -> list[str]:
    """Return the assignment of all features; those of one owner and kind share a call."""
    calls: dict[tuple[str, ...], list[str]] = {}
    renamed = []
    for feature in sorted(features, key=lambda feature: _OWNERS.index(feature.of)):
        if feature.name == feature.column:
            key = (feature.of, feature.kind, *feature.options)
            calls.setdefault(key, []).append(feature.name)
        else:
            renamed.append(_single(feature))
    if not calls:
        return ["data.features = {}", *renamed]
    lines = ["data.features = ("]
    for (of, kind, *options), names in calls.items():
        arguments = [repr(of), repr(kind), *map(repr, names), *options]
        operator = "| " if len(lines) > 1 else ""
        call = f"    {operator}configs.features({', '.join(arguments)})"
        lines += textwrap.wrap(
            call,
            _WIDTH,
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [*lines, ")", *renamed]


def _single(feature: InferredFeature) -> str:
    """Return the assignment of one feature."""
    arguments = [repr(feature.of), repr(feature.kind)]
    if feature.name != feature.column:
        arguments.append(f"column={feature.column!r}")
    call = f"configs.feature({', '.join([*arguments, *feature.options])})"
    return f"data.features.{feature.name} = {call}"


def _left_out(columns: Sequence[LeftOut]) -> list[str]:
    """Return a comment per column that is left out; a feature is a line to take over."""
    lines = []
    possible = [column for column in columns if column.feature]
    if possible:
        lines.append(
            "# Left out: say what it is; a feature, if known before the final ranker runs."
        )
    lines += [
        f"# {_single(column.feature)}  # {column.why}" for column in possible if column.feature
    ]
    others = [column for column in columns if not column.feature]
    if others:
        lines.append("# Left out:")
    lines += [f"# {column.column!r}: {column.why}" for column in others]
    return lines
