"""Names that users give: tasks, variants, qualities."""

from __future__ import annotations

import difflib


def known_name(name: str, known: tuple[str, ...], what: str) -> str:
    """``name``, if it is one of ``known``.

    Raises:
        ValueError: else, saying what ``what`` it should have been, with the nearest name.
    """
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{what} {name!r} does not exist{hint} Known: {', '.join(known)}.")
