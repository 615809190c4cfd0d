"""A training whose node is taken back with notice, and another one takes its place: it ends with the bits of one that nothing happened to."""

import itertools
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from drilling import Drill
from test_train_ray import data, losses, losses_so_far, same_state  # noqa: F401 - the first is a fixture

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time


@pytest.mark.drill("training node drained with a deadline and replaced", ci=False)
def test_a_training_whose_node_is_replaced_costs_no_bit(data: Path, tmp_path: Path, drill: Drill) -> None:  # noqa: F811
    """Two workers on a node each, and a third node that stands by. There is no other checkpoint than the one that the notice asks for."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    (tmp_path / "driver.py").write_text(
        textwrap.dedent(f"""
        import threading, time
        from dataclasses import replace
        from pathlib import Path
        import ray
        from ray.cluster_utils import Cluster
        from ray.core.generated import autoscaler_pb2
        from ray.util import placement_group_table
        from test_train_ray import TRAIN, fit, losses_so_far, once

        if __name__ == "__main__":
            cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}})
            ray.init(address=cluster.address, log_to_driver=False)  # on the head, which stays
            for _ in range(3):
                cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            data, out, undisturbed = map(Path, {[str(data), str(out), str(undisturbed)]!r})
            train = replace(TRAIN, checkpoint_every=10**9, keep_every=0)
            ended = []

            def work(out):
                ended.append(fit(data, out, train, 2, micro_batch=1).path)  # small, so that it takes a while

            work(undisturbed)
            training = threading.Thread(target=work, args=(out,), daemon=True)
            training.start()
            once(lambda: len(losses_so_far(out)) > 20)
            (group,) = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
            taken = group["bundles_to_node_id"][0]
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            ray._raylet.GcsClient(address=cluster.address).drain_node(taken, reason, "taken back", int(time.time() * 1000) + 4000)
            once(lambda: not next(node["Alive"] for node in ray.nodes() if node["NodeID"] == taken))
            assert len(losses_so_far(out)) < 300, "it was over before the node was gone"
            training.join()
            print(*ended)
            ray.shutdown()  # first: a driver ends with the node it is on
            cluster.shutdown()
        """)
    )
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RAY_TMPDIR": os.environ["D2C_RAY_TMPDIR"], "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    }  # fmt: skip
    driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], env=environment, stdout=subprocess.PIPE, text=True)
    lengths, files = [0], set[int]()
    try:
        while driver.poll() is None:
            lengths.append(len(losses_so_far(out)))
            with suppress(FileNotFoundError):
                files.add((out / "metrics.jsonl").stat().st_ino)
            a_moment(driver)
    finally:
        family = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        driver.kill()
        for child in family:
            if child.is_running():
                child.kill()
    said, _ = driver.communicate()
    assert driver.returncode == 0
    assert losses(out) == losses(undisturbed) and len(losses(out)) == 300
    same_state(*map(Path, said.split()[-2:]))
    again = sum(max(0, before - after) for before, after in itertools.pairwise(lengths))
    assert len(files) > 1, "it never began again: what goes on writes its metrics' file anew"
    drill.measured(losses(out), losses(undisturbed), again / len(losses(out)))


def a_moment(driver: subprocess.Popen) -> None:
    """Waits a moment, in which it may end."""
    try:
        driver.wait(0.05)
    except subprocess.TimeoutExpired:
        return
