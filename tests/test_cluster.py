"""The image and the manifests of cluster/, as they reach a cluster. Ray and Kubernetes are not needed."""

import copy
import functools
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kustomize
import pytest
import yaml
from conftest import ROOT
from kuberay_rules import ALLOCATE, HOUR_SEC, QUEUE, faults
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.main import get_command

from d2c_ray import cli, config
from d2c_ray.config import Config

CLUSTER = ROOT / "cluster"
SETTINGS = Path("settings", "kustomization.yaml")
OVERLAYS = ("pipeline", "train", "sweep", "dev")
JOBS = ("pipeline", "train", "sweep")
SCHEMAS = ROOT.parent / "shared" / "kuberay"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
CODE = {"pyproject.toml", "README.md", "d2c_ray", "jobs", "configs"}  # what the image is made of
RAY_VERSION = re.findall(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[0]
WORKDIR = "/home/ray/d2c_ray"
Manifest = dict[str, Any]


def queued(to: Path) -> Path:
    """A copy of cluster/ with Kueue on, by the line that says how."""
    shutil.copytree(CLUSTER, to)
    settings = to / SETTINGS
    text = settings.read_text()
    assert text.count("\n# components: [../kueue]\n") == 1
    settings.write_text(text.replace("\n# components:", "\ncomponents:"))
    return to


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Every manifest by its folder, and the jobs in a queue."""
    folders = {name: CLUSTER / name for name in OVERLAYS}
    with_kueue = queued(tmp_path_factory.mktemp("cluster") / "queued")
    folders |= {f"{name}-queued": with_kueue / name for name in JOBS}
    found = {}
    for name, folder in folders.items():
        (found[name],) = kustomize.render(folder)
    return found


EVERY = [*OVERLAYS, *(f"{name}-queued" for name in JOBS)]


# --- rendering


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, whose kustomize this is held against, is not installed")
@pytest.mark.parametrize("name", [*OVERLAYS, "storage", "queue", "queued"])
def test_the_renderer_does_what_kustomize_does(name: str, tmp_path: Path) -> None:
    folder = queued(tmp_path / "queued") / "train" if name == "queued" else CLUSTER / name
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)

    def by_name(resources: Iterator[Any] | list[Any]) -> dict[str, Any]:
        return {f"{each['kind']} {each['metadata']['name']}": each for each in resources}

    assert by_name(kustomize.render(folder)) == by_name(yaml.load_all(done.stdout, kustomize.LOADER))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("namespace: d2c", "namePrefix: my-"),
        ("disableNameSuffixHash: true", "disableNameSuffixHash: false"),
        ("data.bucket", "data.pail"),
        ("[name=D2C_BUCKET]", "[name=D2C_PAIL]"),
        ("labelSelector: kueue.x-k8s.io/queue-name", "labelSelector: a=b"),
    ],
)
def test_the_renderer_refuses_what_it_does_not_do(old: str, new: str, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    shutil.copytree(CLUSTER, folder)
    text = (folder / SETTINGS).read_text()
    assert old in text
    (folder / SETTINGS).write_text(text.replace(old, new))
    with pytest.raises((kustomize.Unknown, ValueError)):
        kustomize.render(folder / "pipeline")


# --- one place for what installations differ in


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("my-registry/d2c-ray", "else.where/its-image", OVERLAYS),
        ("0.1.0-ray2.60.0", "0.2.0-ray2.60.0", OVERLAYS),
        ("bucket=my-bucket", "bucket=their-bucket", JOBS),
        ("gpu=h100", "gpu=h200", OVERLAYS),
        ("namespace: d2c", "namespace: their-own", (*OVERLAYS, "storage", "queue")),
        ("queue=d2c", "queue=their-queue", (*JOBS, "queue")),
        ("gpu_label=karpenter.k8s.aws/instance-gpu-name", "gpu_label=cloud.google.com/gke-accelerator", OVERLAYS),
        ("spot_label=karpenter.sh/capacity-type", "spot_label=eks.amazonaws.com/capacityType", OVERLAYS),
        ("spot=spot", "spot=SPOT", OVERLAYS),
    ],
)
def test_a_setting_is_changed_in_one_place(old: str, new: str, where: tuple[str, ...], tmp_path: Path) -> None:
    check_one_place(queued(tmp_path / "cluster"), old, new, where)


@pytest.mark.parametrize(
    ("old", "new", "file", "hard", "soft"),
    [
        ("bucket=my-bucket", "bucket=their-bucket", "sweep/kustomization.yaml", "my-bucket", "$D2C_BUCKET"),
        ("my-registry/d2c-ray", "else.where/its-image", "pipeline/rayjob.yaml", "my-registry/d2c-ray:0.1.0", "d2c-ray\n"),
        ("gpu=h100", "gpu=h200", "settings/kustomization.yaml", "gpu-on-demand-too", "gpu-on-demand"),
        (
            "queue=d2c",
            "queue=their-queue",
            "settings/kustomization.yaml",
            "labelSelector: nobody",
            "labelSelector: kueue.x-k8s.io/queue-name",
        ),
    ],
)
def test_a_second_place_is_found(old: str, new: str, file: str, hard: str, soft: str, tmp_path: Path) -> None:
    folder = queued(tmp_path / "cluster")
    text = (folder / file).read_text()
    assert soft in text
    (folder / file).write_text(text.replace(soft, hard + ("\n" if soft.endswith("\n") else "")))
    with pytest.raises((AssertionError, kustomize.Unknown)):
        check_one_place(folder, old, new, JOBS)


def check_one_place(folder: Path, old: str, new: str, where: tuple[str, ...]) -> None:
    """Changing the settings' text changes just what the setting is about, in every manifest, and the old value is nowhere else."""
    before = {name: kustomize.render(folder / name) for name in where}
    text = (folder / SETTINGS).read_text()
    assert len(re.findall(rf"(?<![\w/]){re.escape(old)}(?![\w-])", text)) == 1
    (folder / SETTINGS).write_text(text.replace(old, new))
    key = re.split("[=:]", old)[0] if "=" in old or ": " in old else "image"
    was, now = (re.split("=|: ", each)[-1] for each in (old, new))
    for name in where:
        after = kustomize.render(folder / name)
        assert after != before[name]
        assert was in ("d2c", "spot") or was not in json.dumps(after)  # the two are words of other names
        assert [swapped(each, was, now, key) for each in before[name]] == after


def swapped(node: Any, was: str, now: str, key: str, parent: str = "") -> Any:
    """What a manifest should become: the setting's value in every place that it is in, and nothing else."""
    if isinstance(node, dict):
        if node.get("name") == "D2C_BUCKET" and key == "bucket":
            return {**node, "value": now}
        if node.get("kind") == "LocalQueue" and key == "queue":
            return {**node, "metadata": {**node["metadata"], "name": now}}
        return {name: swapped(value, was, now, key, name) for name, value in node.items()}
    if isinstance(node, list):
        return [swapped(each, was, now, key, parent) for each in node]
    places = {
        "bucket": "", "gpu": "values", "spot": "values", "gpu_label": "key", "spot_label": "key", "namespace": "namespace", "queue": QUEUE, "image": "image",
    }  # fmt: skip
    if parent != places[key] or not isinstance(node, str):
        return node
    return node.replace(was, now) if key == "image" else now if node == was else node


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_left_to_fill_in(name: str, rendered: dict[str, Manifest]) -> None:
    """What stands in the sources where a setting belongs reaches no cluster."""
    assert not re.search(r'"(BUCKET|QUEUE|GPU|GPU_LABEL|SPOT|SPOT_LABEL)"|"image": "d2c-ray', json.dumps(rendered[name]))
    assert rendered[name]["metadata"]["namespace"] == "d2c"


# --- the schemas of the custom resources


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"{kind.lower()}s.v1.schema.json"
    if not path.is_file():
        pytest.skip(f"the schema of KubeRay's custom resources is not at {path}")
    return closed(json.loads(path.read_text()))


def closed(node: Any) -> Any:
    """The schema with unknown fields refused. What it says nothing about (metadata, free forms) stays open."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    done = {key: closed(value) for key, value in node.items()}
    is_schema = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if is_schema and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        done["additionalProperties"] = False
    if node.get("nullable") is True:
        done["type"] = [node["type"], "null"]
    return done


def defaulted(value: Any, schema: dict[str, Any]) -> Any:
    """The value with the schema's defaults, as an API server fills them in before it looks."""
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        missing = {key: copy.deepcopy(own["default"]) for key, own in known.items() if "default" in own and key not in value}
        return {
            key: defaulted(each, known.get(key, others if isinstance(others, dict) else {})) for key, each in {**value, **missing}.items()
        }
    if isinstance(value, list):
        return [defaulted(each, schema.get("items", {})) for each in value]
    return value


OBJECT_META = {"name", "namespace", "labels", "annotations"}


def check_schema(manifest: Manifest) -> None:
    own = schema(manifest["kind"])
    jsonschema.Draft7Validator(own).validate(defaulted(manifest, own))
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    for metadata in [manifest["metadata"], *(each["metadata"] for each in templates(manifest) if "metadata" in each)]:
        assert set(metadata) <= OBJECT_META
        for labels in (metadata.get("labels", {}), metadata.get("annotations", {})):
            assert all(isinstance(value, str) for value in labels.values())


def cluster_of(manifest: Manifest) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def templates(manifest: Manifest) -> list[dict[str, Any]]:
    spec = cluster_of(manifest)
    own = [manifest["spec"]["submitterPodTemplate"]] if "submitterPodTemplate" in manifest["spec"] else []
    return own + [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", EVERY)
def test_manifests_fit_the_schema(name: str, rendered: dict[str, Manifest]) -> None:
    check_schema(rendered[name])


ABSENT = object()
HEAD, GROUPS = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs"


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy with a field set, or without it. A part of the path may be the number of an element, and holds no dot."""
    manifest = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    node: Any = manifest
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    key: Any = int(last) if isinstance(node, list) else last
    if value is ABSENT:
        del node[key]
    elif isinstance(node, list) and key == len(node):
        node.append(value)
    else:
        node[key] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backOffLimit", 3),
        ("spec.backoffLimit", "3"),
        ("spec.ttlSecondsAfterFinished", 1.5),
        ("spec.submitterConfig.retries", 2),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        (HEAD, ABSENT),
        (f"{HEAD}.rayStartParams.num-cpus", 0),
        (f"{HEAD}.template.spec.containers.0.env.0.value", 1),
        (f"{HEAD}.template.spec.terminationGracePeriodSeconds", "90s"),
        (f"{HEAD}.template.metadata.label", {}),
        (f"{GROUPS}.0.groupName", ABSENT),
        (f"{GROUPS}.0.maxReplica", 3),
        (f"{GROUPS}.1.template.spec.tolerations.1.operators", "Exists"),
        (f"{GROUPS}.1.template.spec.volumes.1.emptyDir.mediun", "Memory"),
        (f"{GROUPS}.1.template.spec.containers.0.resources.limits.memory", "64 GB"),
        (f"{GROUPS}.1.template.spec.containers.0.livenessProbe.httpGet.port", ABSENT),
        ("apiVersion", "ray.io/v1alpha1"),
    ],
)
def test_what_does_not_fit_the_schema_is_found(path: str, value: Any, rendered: dict[str, Manifest]) -> None:
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_schema(changed(rendered["pipeline"], path, value))


def test_the_schemas_defaults_are_applied() -> None:
    manifest = {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {"rayClusterSpec": {"workerGroupSpecs": [{"groupName": "a"}]}}}
    filled = defaulted(manifest, schema("RayJob"))
    assert filled["spec"]["submissionMode"] == "K8sJobMode"
    (group,) = filled["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["numOfHosts"]) == (0, 1)


# --- the rules that the schema does not hold


@pytest.mark.parametrize("name", EVERY)
def test_manifests_keep_the_rules(name: str, rendered: dict[str, Manifest]) -> None:
    assert faults(rendered[name], RAY_VERSION) == []


def test_jobs_in_a_queue_say_so(rendered: dict[str, Manifest]) -> None:
    for name in JOBS:
        assert rendered[f"{name}-queued"]["metadata"]["labels"][QUEUE] == "d2c"
        assert QUEUE not in rendered[name]["metadata"]["labels"]


def test_clusters_grow_unless_a_queue_gives_them_room(rendered: dict[str, Manifest]) -> None:
    """One that has its full size from the start runs nothing before every pod of it does."""
    for name, manifest in rendered.items():
        assert cluster_of(manifest)["enableInTreeAutoscaling"] is not name.endswith("-queued"), name


POD = f"{GROUPS}.1.template.spec"  # of the GPU group
EXPRESSIONS = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms.0.matchExpressions"
SPOT, GPU_KEY = f"{EXPRESSIONS}.0.operator", f"{EXPRESSIONS}.1.key"
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("pipeline", {"metadata.name": "x" * 48}, "name:"),
    ("pipeline", {"metadata.name": "d2c_pipeline"}, "name:"),
    ("pipeline", {"metadata.name": "2dc"}, "name:"),
    ("dev", {"metadata.name": "x" * 54}, "name:"),
    ("pipeline", {"spec.shutdownAfterJobFinishes": False}, "ttl:"),
    ("pipeline", {"spec.deletionStrategy.deletionRules": [{"policy": "DeleteCluster"}]}, "deletion: deletionRules with"),
    ("pipeline", {"spec.deletionStrategy.deletionRules": [{"policy": "DeleteWorkers"}]}, "deletion: DeleteWorkers"),
    ("pipeline", {"spec.ttlSecondsAfterFinished": -1}, "ttl: ttlSecondsAfterFinished below"),
    ("pipeline", {"spec.deletionStrategy.onSuccess.policy": "DeleteCluster"}, "deletion: onSuccess and onFailure"),
    ("pipeline", {"spec.deletionStrategy": {key: {"policy": "DeleteNone"} for key in ("onSuccess", "onFailure")}}, "deletion: DeleteNone"),
    ("pipeline", {"spec.deletionStrategy.onFailure.policy": "DeleteWorkers"}, "deletion: DeleteWorkers"),
    ("pipeline", {"spec.deletionStrategy.deletionRules": [{"policy": "DeleteCluster"}], "spec.deletionStrategy.onSuccess": {}}, "deletion: deletionRules with onS"),
    ("pipeline", {"spec.rayClusterSpec": ABSENT}, "cluster:"),
    ("pipeline", {"spec.rayClusterSpec.upgradeStrategy.type": "Recreate"}, "cluster: upgradeStrategy"),
    ("dev", {"spec.networkPolicy": {}}, "cluster: networkPolicy needs"),
    ("dev", {"spec.autoscalerOptions.idleTimeoutSeconds": -1}, "autoscaler: idleTimeoutSeconds"),
    ("dev", {"spec.autoscalerOptions.env.0.name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}, "autoscaler: KUBERAY_GEN"),
    ("dev", {"spec.workerGroupSpecs.0.idleTimeoutSeconds": -1}, "decode: idleTimeoutSeconds"),
    ("dev", {"spec.workerGroupSpecs.0.suspend": True}, "decode: suspended"),
    ("dev", {"spec.rayVersion": "2.55.1"}, "gpu-spot: priority without"),
    ("dev", {"spec.headGroupSpec.template.spec.containers.0.env.0": {"name": "RAY_REDIS_ADDRESS", "value": "redis"}}, "head: Redis"),
    ("pipeline", {f"{GROUPS}.0.template.spec.{EXPRESSIONS}.0.values.0": "on-demand"}, "spot: what tells spot nodes differs"),
    ("pipeline", {f"{HEAD}.template.spec.{EXPRESSIONS}.0.key": "my/label"}, "spot: what tells spot nodes differs: "),
    ("pipeline", {f"spec.submitterPodTemplate.spec.{EXPRESSIONS}.0.values": ["on"]}, "spot: what tells spot nodes differs between"),
    ("pipeline", {"spec.clusterSelector": {"ray.io/cluster": "mine"}}, "backoffLimit: with"),
    ("pipeline", {"spec.submissionMode": "InteractiveMode"}, "backoffLimit: with"),
    ("pipeline", {"spec.backoffLimit": 0}, "backoffLimit: a job"),
    ("pipeline", {"spec.submissionMode": "SidecarMode"}, "SidecarMode: with"),
    ("train", {"spec.submissionMode": "SidecarMode", f"{HEAD}.template.spec.restartPolicy": "Always"}, "SidecarMode: restartPolicy"),
    ("pipeline", {"spec.activeDeadlineSeconds": 0}, "deadline:"),
    ("pipeline", {"spec.preRunningDeadlineSeconds": -1}, "deadline:"),
    ("train-queued", {"spec.preRunningDeadlineSeconds": 3600}, "deadline: a cluster of one size"),
    ("pipeline", {"spec.suspend": True, "spec.shutdownAfterJobFinishes": False}, "suspend:"),
    ("pipeline-queued", {"spec.shutdownAfterJobFinishes": False}, "queue: needs"),
    ("pipeline-queued", {"spec.rayClusterSpec.enableInTreeAutoscaling": True}, "queue: Kueue takes"),
    ("pipeline-queued", {f"{GROUPS}.0.groupName": "head"}, "queue: more than"),
    ("pipeline", {"spec.rayClusterSpec.authOptions.enableK8sTokenAuth": True}, "auth: Kubernetes"),
    ("pipeline", {"spec.rayClusterSpec.authOptions": ABSENT}, "auth: mode"),
    ("dev", {"spec.authOptions.mode": "disabled"}, "auth: mode"),
    ("dev", {"spec.rayVersion": "2.51.2"}, "auth: mode"),
    ("dev", {"spec.rayVersion": "2.60.1"}, "version: rayVersion"),
    ("pipeline", {"spec.rayClusterSpec.rayVersion": ABSENT}, "version: rayVersion"),
    ("pipeline", {f"{POD}.containers.0.image": "my-registry/d2c-ray:0.1.0-ray2.59.0"}, "version: gpu-spot"),
    ("pipeline", {"spec.rayClusterSpec.autoscalerOptions.version": "v1"}, "autoscaler: not v2"),
    ("dev", {"spec.autoscalerOptions": ABSENT}, "autoscaler: not v2"),
    ("dev", {"spec.autoscalerOptions.env": ABSENT}, "autoscaler: a group whose"),
    ("pipeline", {"spec.rayClusterSpec.autoscalerOptions.env.0.value": "3600"}, "autoscaler: a group whose"),
    ("pipeline", {f"{HEAD}.template.spec.containers.0.env.2": {"name": "RAY_enable_autoscaler_v2", "value": "1"}}, "autoscaler: version and"),
    ("pipeline", {f"{HEAD}.template.spec.restartPolicy": "Always"}, "head: restartPolicy"),
    ("pipeline", {f"{POD}.restartPolicy": "OnFailure"}, "gpu-spot: restartPolicy"),
    ("pipeline", {f"{HEAD}.resources": {"CPU": "0"}}, "head: resources both"),
    ("pipeline", {f"{GROUPS}.1.rayStartParams.num-gpus": "1", f"{GROUPS}.1.resources": {"GPU": "1"}}, "gpu-spot: resources both"),
    ("pipeline", {f"{GROUPS}.0.rayStartParams.labels": "a=b"}, "decode: labels"),
    ("train", {f"{GROUPS}.1.maxReplicas": ABSENT}, "gpu-spot: minReplicas"),
    ("train", {f"{GROUPS}.1.minReplicas": ABSENT}, "gpu-spot: minReplicas"),
    ("train", {f"{GROUPS}.1.minReplicas": 9}, "gpu-spot: minReplicas 9"),
    ("train", {f"{GROUPS}.1.replicas": 9}, "gpu-spot: minReplicas"),
    ("dev", {"spec.workerGroupSpecs.0.minReplicas": -1}, "decode: minReplicas"),
    ("dev", {"spec.workerGroupSpecs.1.replicas": 1}, "gpu-spot: does not start from zero"),
    ("train", {"spec.rayClusterSpec.autoscalerOptions": ABSENT}, "gpu-spot: priority without"),
    ("dev", {"spec.workerGroupSpecs.0.priority": 5}, "decode: priority without GPUs"),
    ("pipeline", {f"{HEAD}.rayStartParams.num-cpus": "4"}, "head: num-cpus"),
    ("dev", {"spec.headGroupSpec.rayStartParams": ABSENT}, "head: num-cpus"),
    ("pipeline", {f"{HEAD}.template.spec.{SPOT}": "In"}, "head: may be placed"),
    ("pipeline", {f"{HEAD}.template.spec.affinity": ABSENT}, "head: may be placed"),
    ("pipeline", {f"{HEAD}.template.metadata.annotations": {}}, "head: may be evicted: cluster-autoscaler"),
    ("dev", {"spec.headGroupSpec.template.metadata.annotations": {}}, "head: may be evicted: karpenter"),
    ("pipeline", {f"spec.submitterPodTemplate.spec.{SPOT}": "In"}, "submitter: may be placed"),
    ("pipeline", {"spec.submitterPodTemplate.spec.affinity": ABSENT}, "submitter: may be placed"),
    ("pipeline", {"spec.submitterPodTemplate.metadata": ABSENT}, "submitter: may be evicted: karpenter"),
    ("pipeline", {"spec.submitterConfig": ABSENT}, "submitter: given up"),
    ("pipeline", {"spec.submitterConfig.backoffLimit": 6}, "submitter: given up"),
    ("pipeline", {f"{HEAD}.template.spec.tolerations": ABSENT}, "head: node.kubernetes.io/unreachable: a lost"),
    ("dev", {"spec.headGroupSpec.template.spec.tolerations.0.tolerationSeconds": ABSENT}, "head: node.kubernetes.io/not-ready: a lost"),
    ("pipeline", {f"{GROUPS}.0.template.spec.{SPOT}": "NotIn"}, "decode: no group"),
    ("pipeline", {f"{GROUPS}.0.template.spec.tolerations": ABSENT}, "decode: no toleration of spot"),
    ("pipeline", {f"{POD}.tolerations": []}, "gpu-spot: no toleration of nvidia.com/gpu"),
    ("pipeline", {f"{POD}.tolerations.1.effect": "NoExecute"}, "gpu-spot: no toleration of nvidia.com/gpu"),
    ("dev", {"spec.workerGroupSpecs.2.template.spec.affinity": ABSENT}, "gpu-on-demand: any type"),
    ("pipeline", {f"{POD}.{GPU_KEY}": "nvidia.com/gpu.product"}, "gpu-spot: nvidia.com/gpu.product is set on nodes"),
    ("pipeline", {f"{POD}.volumes.1.emptyDir.medium": ABSENT}, "gpu-spot: /dev/shm is no"),
    ("pipeline", {f"{POD}.containers.0.volumeMounts": ABSENT}, "gpu-spot: /dev/shm is no"),
    ("pipeline", {f"{POD}.volumes.1.emptyDir.sizeLimit": "1Gi"}, "gpu-spot: /dev/shm does not hold"),
    ("pipeline", {f"{POD}.volumes.0": {"name": "shared", "emptyDir": {}}}, "gpu-spot: does not see"),
    ("pipeline", {f"{POD}.volumes.2.emptyDir.sizeLimit": "1Ti"}, "gpu-spot: its node"),
    ("dev", {"spec.workerGroupSpecs.2.template.spec.containers.0.resources.limits.ephemeral-storage": ABSENT}, "gpu-on-demand: its node"),
    ("pipeline", {f"{POD}.terminationGracePeriodSeconds": 60}, "gpu-spot: killed before"),
    ("dev", {"spec.headGroupSpec.template.spec.terminationGracePeriodSeconds": ABSENT}, "head: killed before"),
    ("pipeline", {f"{HEAD}.template.metadata.labels": {"app.kubernetes.io/name": "mine"}}, "head: app.kubernetes.io/name is KubeRay's"),
    ("dev", {"spec.workerGroupSpecs.1.template.metadata.labels": {"ray.io/identifier": "mine"}}, "gpu-spot: ray.io/identifier is KubeRay's"),
    ("pipeline", {f"{HEAD}.template.spec.containers.0.livenessProbe": ABSENT}, "head: no livenessProbe"),
    ("pipeline", {f"{POD}.containers.0.readinessProbe": ABSENT}, "gpu-spot: no readinessProbe"),
    ("pipeline", {f"{POD}.containers.0.resources.requests.memory": "1Gi"}, "gpu-spot: asks for less"),
    ("pipeline", {f"{POD}.securityContext.runAsNonRoot": ABSENT}, "gpu-spot: may run as root"),
    ("pipeline", {"spec.submitterPodTemplate.spec.securityContext.runAsUser": 0}, "submitter: may run as root"),
    ("pipeline", {f"{POD}.containers.0.securityContext": ABSENT}, "gpu-spot: may gain"),
    ("pipeline", {f"{POD}.containers.0.env.0": {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}}, "gpu-spot: AWS_SECRET_ACCESS_KEY"),
    ("dev", {"spec.headGroupSpec.template.spec.containers.0.env.0": {"name": "RAY_AUTH_TOKEN", "value": "x"}}, "head: RAY_AUTH_TOKEN"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "fault"), BROKEN, ids=[f"{each[2]}-{number}" for number, each in enumerate(BROKEN)])
def test_a_broken_rule_is_found(name: str, changes: dict[str, Any], fault: str, rendered: dict[str, Manifest]) -> None:
    broken = rendered[name]
    for path, value in changes.items():
        broken = changed(broken, path, value)
    assert any(each.startswith(fault) for each in faults(broken, RAY_VERSION)), faults(broken, RAY_VERSION)


def test_rays_autoscaler_reads_the_variable() -> None:
    spec = importlib.util.find_spec("ray")  # found, and not imported
    assert spec and spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], "autoscaler", "v2", "instance_manager", "config.py").read_text()
    (seconds,) = re.findall(rf'allocate_status_timeout_s: int = env_integer\(\s*"{ALLOCATE}", (\d+) \* (\d+)', text)
    assert int(seconds[0]) * int(seconds[1]) == HOUR_SEC


# --- commands


def command(manifest: Manifest) -> list[str]:
    """The words of a job's command as the submitter's shell hands them on."""
    (submitter,) = manifest["spec"]["submitterPodTemplate"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in submitter["env"]}
    entrypoint = manifest["spec"]["entrypoint"]
    assert not re.search(r"[\n;&|<>*?`'\"(){}\\\[\]]", entrypoint), "the submitter's shell and the head's would both read it"
    return shlex.split(re.sub(r"\$(\w+)", lambda match: given[match[1]], entrypoint))


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Config, list[str]]:
    """(command of `d2c`, configuration, overrides) of a job's command: by its own script and the command line's own parser."""
    program, script, *arguments = [word.removeprefix(f"{WORKDIR}/") for word in words]
    assert program == "python"
    called: list[list[str]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(cli, "main", lambda argv=None: called.append(sys.argv[1:] if argv is None else list(argv)))
    runpy.run_path(script, run_name="__main__")
    monkeypatch.undo()
    ((name, *rest),) = called
    group: Any = get_command(cli.app)
    context = group.commands[name].make_context(name, rest)
    return name, config.load(ROOT / context.params["config"], context.params["overrides"]), context.params["overrides"]


@pytest.fixture(params=[f"{name}{queue}" for name in JOBS for queue in ("", "-queued")])
def job(request: pytest.FixtureRequest, rendered: dict[str, Manifest]) -> Manifest:
    return rendered[request.param]


def test_commands_are_the_command_lines(job: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, loaded, overrides = parsed(command(job), monkeypatch)
    assert name == {"pipeline": "run"}.get(job["metadata"]["name"].removeprefix("d2c-"), job["metadata"]["name"].removeprefix("d2c-"))
    path = next(word for word in command(job) if word.endswith(".yaml")).removeprefix(f"{WORKDIR}/")
    with pytest.raises(SystemExit) as ended:
        cli.main(["config", str(ROOT / path), *overrides])
    assert ended.value.code == 0
    assert config.from_dict(yaml.safe_load(capsys.readouterr().out)) == loaded


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("resources.actor=8", "did you mean .actors"),
        ("select.budget=lots", "select.budget"),
        ("--dryrun", "No such option"),
        ("select.f", "key=value"),
    ],
)
def test_a_command_that_is_wrong_is_found(wrong: str, said: str, rendered: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match=said):
        parsed([*command(rendered["pipeline"]), wrong], monkeypatch)


def test_commands_resume_from_what_outlives_a_cluster(job: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    check_storage(job, parsed(command(job), monkeypatch)[1])


def check_storage(job: Manifest, loaded: Config) -> None:
    """Run folders on the volume that every pod mounts, images and checkpoints in the bucket, weights on the volume."""
    assert loaded.run.dir.startswith("/shared/")
    assert loaded.data.path.startswith("s3://my-bucket/")
    assert loaded.resources.checkpoint_storage.startswith("s3://my-bucket/")
    assert loaded.evaluate.inception.startswith("/shared/")
    for pod in templates(job)[1:]:
        container = pod["spec"]["containers"][0]
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/shared" in mounted
        assert "nvidia.com/gpu" not in container["resources"]["limits"] or loaded.resources.cache_dir in mounted
        environment = {each["name"]: each.get("value") for each in container["env"]}
        assert environment["HF_HOME"].startswith("/shared/")
        assert {"secretRef": {"name": "d2c-s3", "optional": True}} in container["envFrom"]


def test_commands_ask_for_what_the_groups_hold(job: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    check_capacity(job, parsed(command(job), monkeypatch)[1])


def check_capacity(job: Manifest, loaded: Config) -> None:
    """An actor or training worker a GPU: as many as one group of GPUs holds, and a cluster that waits for them."""
    spec, resources = cluster_of(job), loaded.resources
    grows = spec["enableInTreeAutoscaling"]
    gpus = next(
        group["maxReplicas"] if grows else group["replicas"] for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu-spot"
    )
    assert resources.address == "auto" and resources.autoscaling
    assert resources.actors * resources.gpus_per_actor == gpus
    assert resources.train_workers * (loaded.sweep.concurrent or 1) == gpus
    # Trials reserve nothing for their drivers, and the head is the node that is there before they ask for others.
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(head["cpu"]) >= max(4, 2 * loaded.sweep.concurrent)
    assert int(head["memory"].removesuffix("Gi")) >= 16 + 6 * loaded.sweep.concurrent


@pytest.mark.parametrize(
    "change",
    [
        "run.dir=/tmp/runs",
        "run.dir=s3://my-bucket/runs",
        "data.path=/data/imagenet",
        "resources.checkpoint_storage=/tmp/checkpoints",
        "resources.cache_dir=/tmp",
        "evaluate.inception=inception.pt",
        "resources.address=",
        "resources.autoscaling=false",
        "resources.actors=16",
        "resources.gpus_per_actor=2",
        "resources.train_workers=4",
        "sweep.concurrent=8",
    ],
)
def test_a_command_that_does_not_fit_its_cluster_is_found(
    change: str, rendered: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rendered["pipeline"]
    with pytest.raises((AssertionError, config.UserError)):  # noqa: PT012
        loaded = parsed([*command(job), change], monkeypatch)[1]
        check_storage(job, loaded)
        check_capacity(job, loaded)


def test_training_goes_on_with_the_pipelines_run(rendered: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folders, made with what the pipeline's job says of everything that can change a result."""
    pipeline, train = (config.to_dict(parsed(command(rendered[name]), monkeypatch)[1]) for name in ("pipeline", "train"))
    del pipeline["resources"], train["resources"]
    assert pipeline == train


# --- the image

READS = re.compile(r'\$\(python -c "(.*?)"\)', re.DOTALL)


def image_faults(dockerfile: str) -> list[str]:
    """Where the image leaves pyproject.toml, holds more than code, or runs as root."""
    args = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE))
    lines = re.sub(r"\\\n\s*", "", dockerfile).splitlines()
    found = []
    if [line for line in lines if line.startswith("FROM ")] != ["FROM rayproject/ray:${RAY_VERSION}-${PYTHON}-gpu"]:
        found.append("base: not Ray's image alone")
    ray = next(each for each in map(Requirement, PROJECT["dependencies"]) if each.name == "ray")
    if args["RAY_VERSION"] not in ray.specifier:
        found.append(f"ray: {args['RAY_VERSION']} is not {ray.specifier}")
    python = re.sub(r"^py(\d)(\d+)$", r"\1.\2", args["PYTHON"])
    if python not in SpecifierSet(PROJECT["requires-python"]) or (TOOLS["mypy"]["python_version"], TOOLS["ruff"]["target-version"]) != (
        python,
        args["PYTHON"],
    ):
        found.append(f"python: {python} is not what pyproject.toml says")
    for line in re.findall(r"pip install ((?:\$\(.*?\)|[^&\n])*)", "\n".join(lines)):
        named = {word for word in shlex.split(READS.sub("READ", line)) if not word.startswith("-")}
        if not named <= {"ray==${RAY_VERSION}", ".[${EXTRAS}]", "READ", "."}:
            found.append(f"packages: {line} has a pin of its own")
    if set(args["EXTRAS"].split(",")) & {"dev", "quickstart"} or not set(args["EXTRAS"].split(",")) <= set(
        PROJECT["optional-dependencies"]
    ):
        found.append(f"extras: {args['EXTRAS']}: unknown ones, tests, or packages that are weights")
    copied = [word for line in lines if re.match("COPY|ADD", line) for word in line.split()[1:-1] if not word.startswith("--")]
    if set(copied) != CODE:
        found.append(f"files: {copied}")
    if [line for line in lines if line.startswith("USER ")][-1] != "USER 1000:100":
        found.append("user: root, or one without a number")
    if f"WORKDIR {WORKDIR}" not in lines:
        found.append(f"folder: the commands look in {WORKDIR}")
    return found


def test_the_image_is_what_pyproject_says_and_code_alone() -> None:
    assert image_faults(DOCKERFILE) == []
    (code,) = READS.findall(DOCKERFILE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == PROJECT["optional-dependencies"]["fid"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("FROM rayproject/ray:${RAY_VERSION}", "FROM rayproject/ray:2.60.0", "base:"),
        ("USER root", "FROM ubuntu\nUSER root", "base:"),
        ("RAY_VERSION=2.60.0", "RAY_VERSION=2.59.0", "ray:"),
        ("RAY_VERSION=2.60.0", "RAY_VERSION=2.61.0", "ray:"),
        ("PYTHON=py311", "PYTHON=py312", "python:"),
        ("PYTHON=py311", "PYTHON=py310", "python:"),
        ('".[${EXTRAS}]"', '".[${EXTRAS}]" numpy==2.1', "packages:"),
        ("--no-deps -e .", "--no-deps -e . torch", "packages:"),
        ("EXTRAS=optuna,tensorboard", "EXTRAS=optuna,quickstart", "extras:"),
        ("EXTRAS=optuna,tensorboard", "EXTRAS=optima", "extras:"),
        ("configs configs", "configs configs\nCOPY weights weights", "files:"),
        ("USER 1000:100", "USER root", "user:"),
        ("WORKDIR /home/ray/d2c_ray", "WORKDIR /app", "folder:"),
    ],
)
def test_an_image_that_leaves_pyproject_is_found(old: str, new: str, fault: str) -> None:
    assert old in DOCKERFILE
    assert [each.split(" ")[0] for each in image_faults(DOCKERFILE.replace(old, new))] == [fault]


def test_only_code_is_sent_to_the_builder() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*", "everything stays out but what is named"
    assert {line[1:] for line in ignore if line.startswith("!")} == CODE
    assert any(fnmatch("d2c_ray/data/__pycache__", line) for line in ignore[1:] if not line.startswith("!"))


def test_one_version_of_ray_everywhere(rendered: dict[str, Manifest]) -> None:
    found = {cluster_of(manifest)["rayVersion"] for manifest in rendered.values()}
    images = {
        container["image"] for manifest in rendered.values() for each in templates(manifest) for container in each["spec"]["containers"]
    }
    assert found == {RAY_VERSION}
    (image,) = images
    assert image.endswith(f":{PROJECT['version']}-ray{RAY_VERSION}")


# --- what stays when jobs go


def test_storage_is_what_the_pods_name(rendered: dict[str, Manifest]) -> None:
    claim, account = sorted(kustomize.render(CLUSTER / "storage"), key=lambda each: each["kind"])
    assert (claim["apiVersion"], claim["kind"], account["apiVersion"], account["kind"]) == (
        "v1",
        "PersistentVolumeClaim",
        "v1",
        "ServiceAccount",
    )
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {each["metadata"]["namespace"] for each in (claim, account)} == {"d2c"}
    for manifest in rendered.values():
        for pod in templates(manifest)[manifest["kind"] == "RayJob" :]:
            assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
            (shared,) = [each for each in pod["spec"]["volumes"] if each["name"] == "shared"]
            assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


LITERALS = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:aws_secret_access_key|auth_token)\s*[:=]\s*\S")


@pytest.mark.parametrize(
    "path", sorted(path for path in CLUSTER.rglob("*") if path.is_file()), ids=lambda path: str(path.relative_to(CLUSTER))
)
def test_no_secret_and_no_registry_stands_in_a_file(path: Path) -> None:
    text = path.read_text()
    assert not LITERALS.search(text)
    assert not re.search(r"kind: Secret\b|stringData", text)
    assert not re.search(r"\b[\w-]+\.(io|com|dev|org)/[\w./-]+:[\w.-]+", text)


def test_a_secret_would_be_found() -> None:
    for text in ("AKIA" + "A" * 16, "AWS_SECRET_ACCESS_KEY=abc", "auth_token: abc", "-----BEGIN PRIVATE KEY-----"):
        assert LITERALS.search(text)


def test_the_readme_names_what_there_is(rendered: dict[str, Manifest]) -> None:
    readme = (ROOT / "README.md").read_text()
    page = readme[readme.index("## On Kubernetes") : readme.index("## What it will cost")]
    applied = set(re.findall(r"kubectl apply -k cluster/(\w+)", page))
    assert applied >= {"storage", "dev", "pipeline"}
    assert set(re.findall(r"cluster/(\w+)(?=[ /|])", page)) <= {path.name for path in CLUSTER.iterdir()}
    assert {"d2c-pipeline", "d2c-dev", "d2c-s3"} <= set(re.findall(r"\bd2c-[\w-]+", page))
    assert re.search(r"kubectl (?:logs|delete) .*d2c-pipeline", page) and rendered["pipeline"]["metadata"]["name"] == "d2c-pipeline"
    assert "ray.io/cluster=d2c-dev" in page and rendered["dev"]["metadata"]["name"] == "d2c-dev"
    assert "configs/sweep_imagenet256.yaml" in rendered["sweep"]["spec"]["entrypoint"]
    pod = templates(rendered["pipeline"])[2]["spec"]
    drain = next(each["value"] for each in pod["containers"][0]["env"] if each["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert f"for {drain} s and the pod is killed after {pod['terminationGracePeriodSeconds']} s" in page
    run = Path(next(word for word in rendered["pipeline"]["spec"]["entrypoint"].split() if word.endswith(".yaml"))).stem
    assert page.count(f"/shared/runs/{run}") == 2


def readme_page() -> str:
    readme = (ROOT / "README.md").read_text()
    return readme[readme.index("## On Kubernetes") : readme.index("## Watching a cluster")]


def test_credentials_lie_outside_what_is_uploaded_and_give_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    page = readme_page()
    files = re.findall(r"--from-env-file=(\S+)", page)
    assert files and all(file.startswith(("$HOME/", "~/", "/")) for file in files)
    assert page.index("kubectl apply -k cluster/storage") < page.index("kubectl annotate serviceaccount")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in set(re.findall(r"\bAWS_\w*REGION\b", page)):
        monkeypatch.setenv(name, "eu-west-7")
    assert botocore.session.Session().get_config_variable("region") == "eu-west-7"


def test_a_lost_head_is_waited_for_as_long_as_a_new_node_takes() -> None:
    """KubeRay gives a job up after five minutes without its status, and does not try it again."""
    page = readme_page()
    (operator,) = re.findall(r"helm install kuberay-operator .*", page)
    name, seconds = re.findall(r"env\[0\]\.(?:name|value)=(\w+)", operator)
    assert name == "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS" and int(seconds) >= 1800
    assert "--set-string 'env[0].value=" in operator, "an environment variable is a string"
    assert f"{int(seconds) // 60} minutes" in page


def shell_lines() -> list[str]:
    """The indented command lines of the page, without their comments."""
    return [re.sub(r"\s+#.*$", "", line).strip() for line in readme_page().splitlines() if re.match(r"^ {7}\S", line)]


def test_the_readmes_commands_wait_for_what_they_need() -> None:
    """A pod's name is read when there is a pod, a log when there is a submitter, and every wait has an end."""
    lines = shell_lines()

    def at(start: str) -> int:
        (found,) = [number for number, line in enumerate(lines) if line.startswith(start)]
        return found

    waits = [line for line in lines if line.startswith("kubectl wait")]
    assert all("--timeout=" in line for line in waits) and not any(re.search(r" -w\b| --watch\b", line) for line in lines)
    assert at("kubectl apply -k cluster/dev") < at("kubectl wait -n d2c raycluster/d2c-dev --for=condition=HeadPodReady") < at("HEAD=")
    started = at("kubectl wait -n d2c rayjob/d2c-pipeline --for=jsonpath='{.status.jobDeploymentStatus}'=Running")
    assert at("kubectl apply -k cluster/pipeline") < started < at("kubectl logs")
    assert "--pod-running-timeout=" in lines[at("kubectl logs")], "of a pod that is still to start there is no log"
    done = at("kubectl wait -n d2c rayjob/d2c-pipeline --for=jsonpath='{.status.jobDeploymentStatus}'=Complete")
    assert at("kubectl logs") < done < at("kubectl cp")
    assert lines[-1] == "kubectl delete -k cluster/dev"
    assert "jobDeploymentStatus" in schema("RayJob")["properties"]["status"]["properties"]


def test_the_weights_on_the_volume_are_those_that_the_commands_load(rendered: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = parsed(command(rendered["pipeline"]), monkeypatch)[1]
    wanted = {loaded.vae.path, loaded.teacher.checkpoint, loaded.attach.text.encoder, config.DINOV2[loaded.attach.vision.encoder]}
    fetched: dict[str, list[str]] = {}
    for line in shell_lines():
        if "hf download" in line:
            names = re.findall(r"for model in (.*?);", line)
            model, *rest = shlex.split(re.split(r"[;}]", line[line.index("hf download") + len("hf download") :])[0])
            fetched |= dict.fromkeys(names[0].split() if names else [model], rest)
    assert set(fetched) == wanted
    for model, rest in fetched.items():
        # One pattern an option: a second word would be the name of a file.
        assert rest[::2] == ["--include"] * (len(rest) // 2) and len(rest) % 2 == 0
        # The published DiT is a .bin alone.
        assert rest[1::2] == ([] if model == loaded.teacher.checkpoint else ["*.safetensors", "*.json", "*.model"])
    (target,) = re.findall(r"check_download_inception as get; get\('(.*?)'\)", readme_page())
    assert f"{target}/inception-2015-12-05.pt" == loaded.evaluate.inception
    environment = {
        each["name"]: each.get("value", "")
        for each in cluster_of(rendered["dev"])["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert environment["HF_HOME"].startswith("/shared/") and "HF_HUB_OFFLINE=0" in readme_page()


def test_clean_fids_network_comes_by_the_readmes_words(tmp_path: Path) -> None:
    pytest.importorskip("cleanfid")
    (code,) = re.findall(r'python -c "(from cleanfid.*?)"', readme_page())
    (tmp_path / "inception-2015-12-05.pt").touch()  # what is there is not fetched
    subprocess.run([sys.executable, "-c", code.replace("/shared/weights", str(tmp_path))], check=True, cwd=tmp_path)


def test_the_readmes_small_run_fits_the_cluster_for_development(rendered: dict[str, Manifest]) -> None:
    """It is submitted from here as it stands, needs no package that the image lacks, and no more than one GPU."""
    from d2c_ray.distributed import submit  # and with it Ray

    (line,) = [line for line in shell_lines() if line.startswith("d2c submit")]
    given = shlex.split(line)[2:]
    assert given[given.index("--address") + 1] == "http://127.0.0.1:8265"
    at = given.index("--address")
    path, *overrides = given[:at] + given[at + 2 :]
    job = submit.prepare(str(ROOT / path), overrides, "run", str(ROOT), [], [])
    assert job.entrypoint.startswith(f"python -m d2c_ray.cli run {path} resources.address=auto")
    loaded = config.load(ROOT / path, overrides)
    packages = {"minilm", *config.EFFICIENTNETS}  # which are weights: the image has none
    assert not packages & {
        loaded.attach.text.encoder,
        loaded.attach.vision.encoder,
        loaded.evaluate.network,
        *loaded.evaluate.more_networks,
    }
    assert loaded.attach.vision.encoder == config.load(ROOT / "configs" / "imagenet256.yaml").attach.vision.encoder, (
        "which is on the volume"
    )
    assert loaded.resources.autoscaling and loaded.resources.actors * loaded.resources.gpus_per_actor == 1 == loaded.resources.train_workers
    assert loaded.run.dir.startswith("/shared/") and loaded.evaluate.inception.startswith("/shared/weights/")
    mounted = [each["mountPath"] for each in templates(rendered["dev"])[2]["spec"]["containers"][0]["volumeMounts"]]
    assert loaded.resources.cache_dir in mounted
    lines = shell_lines()
    (forward,) = [each for each in lines if "port-forward" in each]
    (token,) = [each for each in lines if "RAY_AUTH_TOKEN=" in each]
    assert f"service/{rendered['dev']['metadata']['name']}-head-svc 8265:8265" in forward and "base64 -d" in token
    assert lines.index(forward) < lines.index(token) < lines.index(line)


def test_the_commands_help_submits_what_a_cluster_without_packages_of_weights_can_run() -> None:
    from d2c_ray.distributed import submit

    words = shlex.split(cli.COMMANDS["submit"][1])
    path, *overrides = words[2:]
    job = submit.prepare(str(ROOT / path), overrides, "run", str(ROOT), [], [])
    loaded = config.load(ROOT / path, overrides)
    assert job.metadata["run"].startswith("/shared/runs/") and loaded.data.path.startswith("s3://")
    assert loaded.attach.text.encoder != "minilm" and loaded.data.classes == "wordnet", "text needs words"
    assert loaded.resources.autoscaling is False or loaded.resources.actors


def test_the_queue_has_room_for_every_job(rendered: dict[str, Manifest]) -> None:
    """Kueue admits no job that asks for a resource its queue does not cover, or for more than its quota."""
    flavor, cluster_queue = yaml.load_all((CLUSTER / "kueue" / "queue.yaml").read_text(), kustomize.LOADER)
    (local,) = kustomize.render(CLUSTER / "queue")
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (given,) = group["flavors"]
    assert given["name"] == flavor["metadata"]["name"] and local["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    assert group["coveredResources"] == [each["name"] for each in given["resources"]]
    quota = {each["name"]: quantity(each["nominalQuota"]) for each in given["resources"]}
    for name in JOBS:
        job = rendered[f"{name}-queued"]
        assert (local["metadata"]["name"], local["metadata"]["namespace"]) == (
            job["metadata"]["labels"][QUEUE],
            job["metadata"]["namespace"],
        )
        spec, wanted = cluster_of(job), Counter()
        pods = [(job["spec"]["submitterPodTemplate"], 1), (spec["headGroupSpec"]["template"], 1)]
        pods += [(each["template"], each["replicas"]) for each in spec["workerGroupSpecs"]]
        for pod, number in pods:
            for resource, value in pod["spec"]["containers"][0]["resources"]["requests"].items():
                wanted[resource] += number * quantity(value)
        assert all(quota.get(resource, 0) >= value for resource, value in wanted.items()), (name, wanted)


def quantity(value: str | float) -> float:
    """Of Kubernetes: 500m, 16Gi, 8."""
    text = str(value)
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)
