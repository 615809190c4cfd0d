"""Class names from WordNet ids, as ImageNet's class folders are named: n01440764 is 'tench, Tinca tinca'.

An id is the byte offset of the synset's line in data.noun of WordNet 3.0, whose format is wndb(5WN): offset, file
number, type, count of words in hex, then each word (underscores are blanks) with a number, count of pointers, and each
pointer's symbol, offset, type and number; '@' leads to the more general synset.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from d2c_ray.errors import UserError

WORDNET = "wordnet"  # the value of data.classes
USUAL = ("/usr/share/wordnet", "/usr/local/WordNet-3.0/dict")  # Debian's, and WordNet's own
_ID = re.compile(r"n\d{8}")
_OTHER_ID = re.compile(r"[vars]\d{8}")
_MAPPING_LINE = re.compile(r"(n\d{8})[ \t]+(\S.*)")


def is_id(name: str) -> bool:
    """Whether a class name is a noun's WordNet id."""
    return _ID.fullmatch(name) is not None


def file(classes: str) -> Path | None:
    """data.noun where `data.classes` asks for WordNet (by 'wordnet' or a local folder), else None.

    Raises:
        UserError: WordNet is asked for and not there.
    """
    if classes == WORDNET:
        env = os.environ
        folders = [env["WNSEARCHDIR"]] if env.get("WNSEARCHDIR") else []
        folders += [f"{env['WNHOME']}/dict"] if env.get("WNHOME") else []
        folders += USUAL
    elif classes and Path(classes).expanduser().is_dir():
        folders = [classes]
    else:
        return None
    for folder in folders:
        path = Path(folder).expanduser() / "data.noun"
        if path.is_file():
            return path
    raise UserError(
        f"data.classes={classes}: there is no data.noun in {', '.join(folders)}. WordNet 3.0 is what Debian's package wordnet-base holds; "
        "its folder as data.classes or in WNSEARCHDIR would do, or a text file of class names."
    )


def digest(path: Path) -> str:
    """A hash of WordNet's nouns."""
    stat = path.stat()
    return _digest(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _digest(path: str, size: int, changed_ns: int) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def translate(names: Sequence[str], path: Path) -> list[str]:
    """Names with every WordNet id replaced by the words of its synset; other names stay.

    Synsets of the same words (two of ImageNet's are 'crane') are told apart by the words of the more general one.

    Raises:
        UserError: an id of no noun, or of another version of WordNet.
    """
    for name in names:
        if _OTHER_ID.fullmatch(name):
            raise UserError(f"data.classes: '{name}' is no noun; WordNet ids of images are of the form n01440764.")
    with open(path, "rb") as nouns:
        found = {name: _synset(nouns, name, path) for name in names if is_id(name)}
        words = {name: own for name, (own, _) in found.items()}
        more = {name: _synset(nouns, found[name][1], path)[0] for name in _equal(words) if found[name][1]}
    named = _named_apart(words, more)
    return [named.get(name, name) for name in names]


def mapping(text: str) -> dict[str, str] | None:
    """Names by id of a class file whose lines are 'n01440764 tench, Tinca tinca' (blank or tab), in its order; else None.

    Raises:
        UserError: an id that comes twice.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not all(map(_MAPPING_LINE.fullmatch, lines)):
        return None
    pairs = [(name, words) for name, words in (line.split(maxsplit=1) for line in lines)]
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise UserError(f"data.classes: the id {twice[0]} comes twice in the file of names by WordNet ids.")
    return _named_apart(dict(pairs), {})


def by_mapping(names: Sequence[str], known: dict[str, str], where: str) -> list[str]:
    """Names with every WordNet id replaced by what a mapping says; other names stay.

    Raises:
        UserError: an id that the mapping lacks.
    """
    missing = [name for name in names if is_id(name) and name not in known]
    if missing:
        raise UserError(f"'{where}' lacks {len(missing)} of the data's WordNet ids, the first {missing[0]}.")
    return [known.get(name, name) for name in names]


def _synset(nouns: BinaryIO, name: str, path: Path) -> tuple[str, str]:
    """A synset's words, and the id of the more general one ('' where there is none)."""
    nouns.seek(int(name[1:]))
    fields = nouns.readline().decode("utf-8", "replace").split(" | ")[0].split()
    if not fields or fields[0] != name[1:]:
        raise UserError(
            f"data.classes: '{path}' has no synset at {name}, so it is of another version than the id. ImageNet's ids are of WordNet 3.0."
        )
    if fields[2] != "n":
        raise UserError(f"data.classes: {name} is no noun in '{path}'.")
    count = int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    general = [f"n{offset}" for symbol, offset in zip(pointers[0::4], pointers[1::4], strict=False) if symbol in ("@", "@i")]
    return ", ".join(words), general[0] if general else ""


def _equal(words: dict[str, str]) -> list[str]:
    """The ids whose words another id has too."""
    counts = Counter(words.values())
    return [name for name, own in words.items() if counts[own] > 1]


def _named_apart(words: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    """Names by id, no two equal: what is equal gets the more general words behind it, or else its id."""
    named = {**words, **{name: f"{words[name]}, {more[name]}" for name in _equal(words) if more.get(name)}}
    return {**named, **{name: f"{named[name]}, {name}" for name in _equal(named)}}
