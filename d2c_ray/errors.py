"""The one exception type users are meant to read."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the user gave cannot be used: says what was found and what would do.

    The command line prints it without a traceback and exits with 2. Raised before accelerators are taken wherever
    the fault can be seen that early.
    """


class Stopped(BaseException):
    """The process was asked to end (SIGTERM, which `ray job stop`, Kubernetes and batch systems send). Nothing is wrong with the run."""


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing where none is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(text: str) -> str:
    """Text for a terminal: what would steer it, in a key or a name that others chose, is written out instead."""
    import unicodedata

    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" and char not in "\n\t" else char for char in text
    )


def no_room(error: BaseException, path: object = "") -> UserError | None:
    """What to tell a user whose disk or quota is full, if that is what `error` says.

    Args:
        path: what could not be written, where that is known.
    """
    words = str(error)
    numbered = isinstance(error, OSError) and error.errno in NO_ROOM
    told = type(error).__name__ == "SafetensorError" and any(f"(os error {number})" in words for number in NO_ROOM)  # in words alone
    if not numbered and not told:
        return None
    return UserError(
        f"no room is left on the disk{f' of {path}' if path else ''}: {' '.join(words.split())}. "
        "What is finished is kept; make room there, and the same command goes on from here."
    )
