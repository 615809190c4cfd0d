"""Runs that find their disk full: `unshare -rm python full_disk.py DISK OUT PATTERN... -- words of d2c`, in a mount of their own.

A small file system is mounted at DISK. For every PATTERN the command is started, and the disk is filled to the last byte as soon as
a file that fits it is there. What came of each goes into OUT/attempts.json. Then room is made, the command is started once more,
and what it leaves is copied to OUT/disk.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MIB = 1 << 20
SIZE = 192 * MIB


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for block in (MIB, 4096):
            try:
                while True:
                    file.write(bytes(block))
            except OSError:
                continue


def files(disk: Path) -> dict[str, int]:
    """Finished files with their times of writing."""
    found = (
        path
        for path in disk.rglob("*")
        if path.name == "_SUCCESS.json" or path.match("scores-*/part-*") or path.match("condensed-*/part-*")
    )
    return {str(path.relative_to(disk)): path.stat().st_mtime_ns for path in found}


def attempt(words: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as out:
        return subprocess.Popen([sys.executable, *words], stdout=out, stderr=subprocess.STDOUT)


def main() -> None:
    split = sys.argv.index("--")
    disk, out, patterns, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:split], sys.argv[split + 1 :]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], check=True)
    ballast, log, attempts = disk / "ballast", out / "log", []
    for pattern in patterns:
        process, until = attempt(words, log), time.monotonic() + 180
        while not list(disk.glob(pattern)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # it writes nothing while there is less and less room
            fill(ballast)
            process.send_signal(signal.SIGCONT)
        before = files(disk)
        try:
            code = process.wait(240)
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        said = log.read_text()
        ballast.unlink(missing_ok=True)
        attempts.append({"pattern": pattern, "code": code, "said": said[-6000:], "before": before, "left": os.statvfs(disk).f_bavail})
    process = attempt(words, log)
    code = process.wait(400)
    attempts.append({"pattern": "", "code": code, "said": log.read_text()[-6000:], "before": files(disk)})
    (out / "attempts.json").write_text(json.dumps(attempts))
    shutil.copytree(disk, out / "disk", symlinks=True)


if __name__ == "__main__":
    main()
