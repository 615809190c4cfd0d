"""The command line with its work written down: `python watched.py LOG [--pause PATTERN MARKER] -- words of d2c`.

LOG gets a line of JSON for every unit that an actor begins and every stage that begins. With --pause the process stands still for
ever as soon as it is about to give a file that fits PATTERN its name, and says so by making MARKER: half of what it writes is
there, and it is for someone else to kill it.
"""

import json
import os
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def main() -> None:
    split = sys.argv.index("--")
    log, pause, words = sys.argv[1], sys.argv[3:split], sys.argv[split + 1 :]

    def begun(what: str, number: int) -> None:
        with open(log, "a") as file:
            file.write(json.dumps({"what": what, "number": number}) + "\n")

    import pyarrow.parquet as pq

    from d2c_ray.distributed import actors

    def noted_batch(cls: type) -> type:
        class Noted(cls):  # type: ignore[misc, valid-type]
            def __call__(self, batch: Any) -> Any:
                (unit,) = (json.loads(text) for text in batch.column("unit").to_pylist())
                begun(cls.__name__, unit["stop"] - unit["start"])
                return super().__call__(batch)

        return Noted

    def noted_run(cls: type) -> type:
        class Noted(cls):  # type: ignore[misc, valid-type]
            def run(self, unit: Any) -> Any:
                rows = unit["stop"] - unit["start"] if "stop" in unit else int(pq.read_metadata(unit["samples"]).num_rows)
                begun(cls.__name__, rows)
                return super().run(unit)

        return Noted

    # Before the modules that use them import them.
    actors.Scorer, actors.Attacher = noted_batch(actors.Scorer), noted_batch(actors.Attacher)  # type: ignore[misc]
    actors.FeatureExtractor = noted_batch(actors.FeatureExtractor)  # type: ignore[misc]
    actors.Sampler, actors.Embedder = noted_run(actors.Sampler), noted_run(actors.Embedder)  # type: ignore[misc]

    from d2c_ray import cli, pipeline

    known = pipeline.stage_function

    def stage_function(stage: str) -> Any:
        begun(stage, 1)
        return known(stage)

    pipeline.stage_function = stage_function
    if pause:
        pattern, marker = pause
        replace = os.replace

        def stopping(source: Any, target: Any) -> None:
            if fnmatch("/".join(Path(target).parts[-2:]), pattern):
                Path(marker).touch()
                while True:
                    time.sleep(60)
            replace(source, target)

        os.replace = stopping
    cli.main(words)


if __name__ == "__main__":
    main()
