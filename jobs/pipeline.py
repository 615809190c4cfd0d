"""The pipeline, or any single stage of it, as a Ray job.

    ray job submit --working-dir . -- python jobs/pipeline.py configs/quickstart.yaml resources.address=auto run.dir=/shared/runs key=value
    ray job submit --working-dir . -- python jobs/pipeline.py score configs/quickstart.yaml resources.address=auto run.dir=/shared/runs

The same words as behind `d2c`; a configuration alone is run from end to end. The run folder (run.dir) must lie on storage that every
node sees, by an absolute path. The upload leaves out what .gitignore and .rayignore name, and must stay below 512 MiB. `d2c submit`
gives the same job, looks at all of this beforehand, and exits as the job did.
"""

import sys

from d2c_ray.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    main(["run", *given] if given and given[0].lower().endswith((".yaml", ".yml")) else given)
