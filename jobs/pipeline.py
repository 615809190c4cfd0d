"""The pipeline, or any single stage of it, as a Ray job.

    ray job submit --working-dir . -- python jobs/pipeline.py run configs/quickstart.yaml resources.address=auto key=value
    ray job submit --working-dir . -- python jobs/pipeline.py score configs/quickstart.yaml resources.address=auto

The same words as behind `d2c`. The run folder (run.dir) must lie on storage that every node sees.
"""

from d2c_ray.cli import main

if __name__ == "__main__":
    main()
