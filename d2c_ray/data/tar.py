"""The headers of a tar file: names and byte ranges of its members, without reading what lies between.

Formats: POSIX ustar, GNU (long names, base-256 sizes), pax, and the older v7. Python's tarfile builds an object a member
and takes about 20 times as long.
"""

from collections.abc import Callable, Iterator

from d2c_ray.errors import UserError

BLOCK = 512
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_FILE, _OLD_FILE, _CONTIGUOUS = ord("0"), 0, ord("7")
_LINKS = (ord("1"), ord("2"))
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = ord("x"), ord("g"), ord("L"), ord("K"), ord("S")
_HEADER_BYTES = 1 << 20  # of a name or of pax records, at most: they are read whole, and an archive may say any length

Read = Callable[[int, int], bytes]  # (start, stop) to the bytes between; fewer only where the file ends


def members(read: Read, size: int, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of every regular file, in the order of the archive; as `tar -t`, up to the first empty block.

    Args:
        read: gives the archive's bytes.
        size: of the archive, bytes.
        where: what to call it in an error.

    Raises:
        UserError: compressed, no tar file, damaged or cut off, or members that hold no bytes of their own (links, sparse).
    """
    position = 0
    long_name = ""
    pax: dict[str, str] = {}
    pax_global: dict[str, str] = {}
    while position < size:
        header = read(position, position + BLOCK)
        kind = header[156] if len(header) == BLOCK else -1
        if header[257:262] != b"ustar" or kind < 0:
            if len(header) == BLOCK and not any(header):
                return
            _check_old_header(header, position, where)
        digits = header[124:136]
        try:
            length = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.rstrip(b"\0 ") or b"0", 8)
        except ValueError:
            length = -1
        if length < 0:  # which octal digits may have a sign for: the walk would go back, for ever
            raise UserError(f"'{where}' is damaged: the tar header at byte {position} gives no size ({digits!r}).")
        start = position + BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME) and length > _HEADER_BYTES:
            raise UserError(f"'{where}' is damaged: the tar header at byte {position} says that a name takes {length:,} bytes.")
        if kind in (_FILE, _OLD_FILE, _CONTIGUOUS):
            if pax or pax_global or long_name:
                stated = {**pax_global, **pax}
                name = stated.get("path") or long_name
                if not stated.get("size", "0").isdecimal():
                    raise UserError(f"'{where}' is damaged: '{name}' has the size {stated['size']!r}.")
                length = int(stated.get("size", length))
                if "GNU.sparse.major" in stated or "GNU.sparse.size" in stated:
                    raise UserError(f"'{where}': '{name}' is a sparse file, whose bytes do not lie in one piece. Pack it without --sparse.")
                long_name, pax = "", {}
            else:
                name = ""
            if not name:
                name = header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                if header[345] and header[262] == 0:  # POSIX only: GNU keeps times there
                    name = header[345:500].split(b"\0", 1)[0].decode("utf-8", "surrogateescape") + "/" + name
            if start + length > size:
                raise UserError(f"'{where}' is cut off: '{name}' ends at byte {start + length}, the file at byte {size}.")
            yield name, start, length
        elif kind == _PAX:
            pax = _pax_records(read(start, start + length))
        elif kind == _PAX_GLOBAL:
            pax_global.update(_pax_records(read(start, start + length)))
        elif kind == _LONG_NAME:
            long_name = read(start, start + length).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif kind in _LINKS or kind == _SPARSE:
            name = pax.get("path") or long_name or header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            what = "a sparse file" if kind == _SPARSE else "a link"
            raise UserError(f"'{where}': '{name}' is {what}, which holds no bytes of its own. Pack it with tar --hard-dereference -h.")
        elif kind != _LONG_LINK:  # folders and devices hold nothing
            long_name, pax, length = "", {}, 0
        position = start + (length + BLOCK - 1) // BLOCK * BLOCK


def _check_old_header(header: bytes, position: int, where: str) -> None:
    """Accepts a header without magic (v7) by its checksum."""
    if position == 0:
        for magic, name in _MAGIC.items():
            if header.startswith(magic):
                raise UserError(
                    f"'{where}' is compressed ({name}): images inside could not be reached without unpacking all before them. Unpack it to a plain .tar."
                )
    if len(header) < BLOCK:
        raise UserError(f"'{where}' is cut off: {len(header)} bytes of a header at byte {position}.")
    try:
        stated = int(header[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        stated = -1
    if stated != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise UserError(f"'{where}' is no tar file, or a damaged one: no tar header at byte {position}.")


def _pax_records(data: bytes) -> dict[str, str]:
    """Records 'length key=value newline' of a pax header."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            break  # nothing that follows has a place, and a record of no length would be read for ever
        record, data = data[len(digits) + 1 : int(digits) - 1], data[int(digits) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records
