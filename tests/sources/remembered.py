"""Reading of files that several sources of a test share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def remembered(read: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of a path, which reads files that have not changed only once."""
    kept: dict[Any, Any] = {}

    def read_once(*arguments: Any, **options: Any) -> Any:
        folders = [Path(path) for path in arguments if Path(path).is_dir()]
        files = [file for folder in folders for file in sorted(folder.rglob("*"))]
        states = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        if not options.get("max_users"):
            options.pop("seed", None)  # which users are kept is all that it decides
        key = arguments, tuple(sorted(options.items())), states
        if key not in kept:
            kept[key] = read(*arguments, **options)
        return kept[key]

    return read_once
