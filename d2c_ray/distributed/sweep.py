"""Ray Tune around a sweep's work: which trial runs when, which ends early, and what is tried next. What a trial does is not known here.

A trial is a driver that reserves no CPU; the actors and training workers that it starts do. Tune's own record of an experiment
is pickled and is never read back: a sweep that is started again goes by the run folder.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from d2c_ray.config import SweepConfig

Report = Callable[[dict[str, float]], None]
Work = Callable[[dict[str, Any], Report], None]  # (what Tune chose, where to report measures)
Ended = Callable[[dict[str, Any], str], None]  # (what Tune chose, 'done', 'stopped' or 'failed')
IMAGES = "images"  # what ASHA counts in
PACKAGE = "optuna"


def try_each(
    work: Work, given: list[dict[str, Any]], options: SweepConfig, concurrent: int, more_is_better: bool, last: int, ended: Ended
) -> None:
    """Runs `work` on each of `given`, `concurrent` at once.

    Args:
        more_is_better: of the first of options.metrics, by which ASHA goes where it is on.
        last: images of a trial that ASHA lets go on to its end.
    """
    scheduler: TrialScheduler = FIFOScheduler()
    if options.asha:
        scheduler = AsyncHyperBandScheduler(
            time_attr=IMAGES, metric=options.metrics[0], mode="max" if more_is_better else "min", max_t=last, grace_period=options.asha,
            reduction_factor=options.reduction,
        )  # fmt: skip
    space = {"index": tune.grid_search(list(range(len(given))))}

    def one(chosen: dict[str, Any], report: Report) -> None:
        work(given[chosen["index"]], report)

    _fit(
        one,
        space,
        BasicVariantGenerator(max_concurrent=concurrent),
        scheduler,
        1,
        options,
        lambda chosen, how: ended(given[chosen["index"]], how),
    )


def optimise(
    work: Work, options: SweepConfig, before: list[dict[str, Any]], concurrent: int, more_is_better: list[bool], ended: Ended
) -> None:
    """Runs `work` on points that Optuna chooses from the axes by what came of those before.

    Args:
        before: points of an earlier attempt, in the order in which they were chosen; they are tried first.
        more_is_better: of each of options.metrics.
    """
    from ray.tune.search.optuna import OptunaSearch

    # Points of an earlier attempt draw nothing: with the seed of that attempt the next ones would be its first again.
    seed = int(np.random.SeedSequence([options.search_seed, len(before)]).generate_state(1)[0])
    modes = ["max" if more else "min" for more in more_is_better]
    several = len(modes) > 1
    search = OptunaSearch(
        metric=options.metrics if several else options.metrics[0], mode=modes if several else modes[0], seed=seed,
        points_to_evaluate=before or None, space={key: _axis(values) for key, values in options.axes.items()},
    )  # fmt: skip
    limited = tune.search.ConcurrencyLimiter(search, max_concurrent=concurrent)
    _fit(work, {}, limited, FIFOScheduler(), options.num_points, options, ended)


def _axis(values: Any) -> Any:
    import optuna

    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution(values)
    if values.get("integer"):
        return optuna.distributions.IntDistribution(values["low"], values["high"], log=bool(values.get("log")))
    return optuna.distributions.FloatDistribution(float(values["low"]), float(values["high"]), log=bool(values.get("log")))


def _fit(
    work: Work,
    space: dict[str, Any],
    search: Searcher | SearchAlgorithm,
    scheduler: TrialScheduler,
    samples: int,
    options: SweepConfig,
    ended: Ended,
) -> None:
    # Tune would write a CSV, a JSON and TensorBoard files for each trial; the run folder has it all.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of a configuration may be relative to where the command was given
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # an interrupt ends the sweep, and not Tune alone
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints its table whatever `verbose` says
    # It would warn that those files are not there.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    folder = tempfile.mkdtemp(prefix="d2c-tune-")
    try:
        # No CPU; Tune takes no request for nothing at all, so that it is a byte of memory.
        trainable = tune.with_resources(partial(_call, work), tune.PlacementGroupFactory([{"memory": 1}]))
        tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(search_alg=search, scheduler=scheduler, num_samples=samples, reuse_actors=True),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, verbose=0, callbacks=[_Told(ended)],
                failure_config=tune.FailureConfig(max_failures=options.max_failures),
            ),
        ).fit()  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(work: Work, chosen: dict[str, Any]) -> None:
    work(chosen, tune.report)


class _Told(tune.Callback):
    """Passes on how a trial ended."""

    def __init__(self, ended: Ended):
        self._ended = ended

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended(trial.config, "done" if (trial.last_result or {}).get("finished") else "stopped")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ended(trial.config, "failed")
