"""A sweep as a Ray job.

    ray job submit --working-dir . -- python jobs/sweep.py configs/sweep_digits.yaml resources.address=auto run.dir=/shared/runs key=value

The same words as behind `d2c sweep`; `d2c submit --stage sweep` gives the same job. The run folder (run.dir) must lie on storage that
every node sees, by an absolute path. The upload leaves out what .gitignore and .rayignore name, and must stay below 512 MiB.
"""

import sys

from d2c_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
