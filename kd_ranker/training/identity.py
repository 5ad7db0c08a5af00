"""The identity of a trained state: its members, and digests of all that made them.

A checkpoint and the results of a cohort hold it, and neither is taken for those of another.
"""

from collections.abc import Mapping

Identity = Mapping[str, str]


def differences(there: Identity, here: Identity) -> str:
    """The parts in which two identities differ, in one line; "" if they are the same."""
    return ", ".join(
        f"{part} ({_shown(there.get(part, ''), here.get(part, ''))})"
        for part in (*here, *(there.keys() - here.keys()))
        if there.get(part) != here.get(part)
    )


def _shown(there: str, here: str) -> str:
    """Two lists of names, without those that they share unless they differ in their order alone."""
    names, others = there.split(", "), here.split(", ")
    if set(names) == set(others):
        return f"{there} there, {here} now"
    more = ", ".join(name for name in names if name not in others)
    others_more = ", ".join(name for name in others if name not in names)
    return f"{more or 'no other'} there, {others_more or 'no other'} now"
