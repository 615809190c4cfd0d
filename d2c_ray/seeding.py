"""Every random thing is drawn from a seed derived here, so that it depends on what it is and not on when it ran."""

import hashlib


def derive(*parts: int | str) -> int:
    """A 64-bit seed that is a pure function of `parts` (for example a seed, a purpose and a key).

    Parts keep their type and their borders: ("1", 2) and (1, "2") and ("12",) all differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if not isinstance(part, int | str) or isinstance(part, bool):
            raise TypeError(f"a seed is derived from int and str, got {type(part).__name__}")
        encoded = f"{type(part).__name__}:{part}".encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")
