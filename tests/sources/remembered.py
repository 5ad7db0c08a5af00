"""Reading of files that several tests share."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def remembered(read: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of a folder, which reads equal files only once, wherever they lie."""
    kept: dict[Any, Any] = {}

    def contents(argument: Any) -> Any:
        folder = Path(argument)
        if not folder.is_dir():
            return argument
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return tuple(
            (str(file.relative_to(folder)), hashlib.md5(file.read_bytes()).digest())
            for file in files
        )

    def read_once(*arguments: Any, **options: Any) -> Any:
        options.pop("directory", None)
        if not options.get("max_users"):
            options.pop("seed", None)  # which users are kept is all that it decides
        key = tuple(map(contents, arguments)), tuple(sorted(options.items()))
        if key not in kept:
            kept[key] = read(*arguments, **options)
        return kept[key]

    return read_once
