"""Words for people: what others named or said, made fit for a terminal, a log and a page."""

import difflib
import re
import unicodedata

# Credentials in a text, and what is left of them. A user name in a URL is one as well: it may be a key's id.
_CREDENTIALS = (
    (re.compile(r"(?<=://)[^\s/?#'\"<>]*@"), "***@"),  # scheme://user:password@host
    # user:password@host, also where the password holds a slash or the scheme lacks one.
    (re.compile(r"(?<![\w%.~+-])[^\s/:@,;=?&'\"<>()\[\]{}]{1,256}:(?!//)[^\s@'\"<>]{1,4096}@(?=[\w\[])"), "***@"),
    (  # ?token=..., &X-Amz-Signature=...
        re.compile(
            r"((?:^|[?&;#\s,'\"(])[\w.-]{0,64}(?:token|signature|secret|passw(?:or)?d|pwd|api[-_]?key|access[-_]?key(?:[-_]?id)?|credentials?|\bsig)=)"
            r"[^\s&;#'\")]+",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\"]+", re.IGNORECASE), r"\1***"),
)


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing where none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(text: str) -> str:
    """Text for a terminal: what would steer it, in a key or a name that others chose, is written out instead."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" and char not in "\n\t" else char for char in text
    )


def in_markdown(value: object) -> str:
    """Words that are not ours, so that Markdown and HTML show them as they are: on one line, nothing in them acts."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&@:])", r"\\\1", " ".join(str(value).split()))


def redacted(text: str) -> str:
    """A text without the credentials in it: user names and passwords of URLs, with a scheme or without, and tokens of their queries.

    For what libraries say, which quote the URL they were given, or found in the environment.
    """
    if "@" not in text and "=" not in text and ":" not in text:
        return text
    for credentials, left in _CREDENTIALS:
        text = credentials.sub(left, text)
    return text


def first_line(error: BaseException) -> str:
    """What an error of a library says first, without credentials; its type where it says nothing."""
    return (redacted(str(error)).strip().splitlines() or [type(error).__name__])[0]
