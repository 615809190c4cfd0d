"""What ends a run with words for its user in the place of a traceback."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something the user gave cannot be used: says what was found and what would do.

    The command line prints it without a traceback and exits with 2. Raised before accelerators are taken wherever
    the fault can be seen that early.
    """


class Stopped(BaseException):
    """The process was asked to end (SIGTERM, which `ray job stop`, Kubernetes and batch systems send). Nothing is wrong with the run."""


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
