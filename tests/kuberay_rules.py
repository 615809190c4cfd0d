"""What the schema of KubeRay's custom resources does not hold: the operator's own rules (its validation.go, v1.7), Kueue's, and this project's.

`faults` says of a manifest, as it was written and before any default, what is wrong with it; nothing is an empty list.
"""

import re
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]
MOST_OF_A_NAME = {"RayJob": 47, "RayCluster": 53}
QUEUE = "kueue.x-k8s.io/queue-name"
STAY = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
SUBMITTED_AGAIN = 10  # times at least that a submitter starts anew: every lost head ends one, and the last failure the job
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DRAIN_SEC = 30.0  # Ray's own, where the variable is not set
OBJECT_STORE = 0.3  # of a pod's memory, Ray's own; what does not fit into /dev/shm goes to a disk
OF_KUBERAY = {"app.kubernetes.io/name", "app.kubernetes.io/created-by", "ray.io/identifier"}  # labels that a pod template may overrule
HOUR_SEC, DAY_SEC = 3600, 86_400
ALLOCATE = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"  # of Ray's autoscaler, an hour unless set
LOST_SEC = 60  # without news of its node, after which a head is given up at the latest; Kubernetes' own is 300
OF_REDIS = {"RAY_REDIS_ADDRESS", "REDIS_USERNAME", "REDIS_PASSWORD"}
GATED = {"networkPolicy", "tlsOptions", "historyServerOptions"}
OF_RAY = ("num-cpus", "num-gpus", "memory", "resources")
UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def faults(manifest: Spec, ray_version: str) -> list[str]:
    """What is wrong with a RayJob or RayCluster.

    Args:
        ray_version: the one that pyproject.toml pins.
    """
    name, kind, spec = manifest["metadata"]["name"], manifest["kind"], manifest["spec"]
    found = []
    if len(name) > MOST_OF_A_NAME[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"name: {name} is longer than {MOST_OF_A_NAME[kind]} or no DNS-1035 label")
    if kind == "RayJob":
        found += _job(manifest["metadata"].get("labels", {}), spec)
    cluster = spec.get("rayClusterSpec", {}) if kind == "RayJob" else spec
    return found + list(_cluster(cluster, ray_version)) if cluster else found


def _job(labels: Spec, spec: Spec) -> Iterator[str]:
    cluster, mode = spec.get("rayClusterSpec", {}), spec.get("submissionMode", "K8sJobMode")
    shutdown, selector = spec.get("shutdownAfterJobFinishes", False), spec.get("clusterSelector")
    strategy = spec.get("deletionStrategy", {})
    rules, ends = strategy.get("deletionRules", []), {key: strategy[key] for key in ("onSuccess", "onFailure") if key in strategy}
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttl: ttlSecondsAfterFinished below 0"
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttl: ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if rules and shutdown:
        yield "deletion: deletionRules with shutdownAfterJobFinishes"
    if rules and ends:
        yield "deletion: deletionRules with onSuccess or onFailure"
    if ends and (set(ends) != {"onSuccess", "onFailure"} or not all(each.get("policy") for each in ends.values())):
        yield "deletion: onSuccess and onFailure need each other, and a policy"
    if any(rule.get("policy") == "DeleteWorkers" for rule in (*rules, *ends.values())) and cluster.get("enableInTreeAutoscaling"):
        yield "deletion: DeleteWorkers with autoscaling"
    if shutdown and any(each.get("policy") == "DeleteNone" for each in ends.values()):
        yield "deletion: DeleteNone with shutdownAfterJobFinishes"
    if not cluster and not selector:
        yield "cluster: neither rayClusterSpec nor clusterSelector"
    if spec.get("backoffLimit", 0) > 0 and (selector or mode == "InteractiveMode"):
        yield "backoffLimit: with clusterSelector or InteractiveMode"
    if spec.get("backoffLimit", 0) < 1 and not selector:
        yield "backoffLimit: a job that is not tried again does not go on by itself"
    if mode == "SidecarMode":
        if selector or "submitterPodTemplate" in spec or "submitterConfig" in spec:
            yield "SidecarMode: with clusterSelector, submitterPodTemplate or submitterConfig"
        if cluster and cluster["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "SidecarMode: restartPolicy of the head is not Never"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) < 1:
            yield f"deadline: {key} below 1"
    if not cluster.get("enableInTreeAutoscaling") and spec.get("preRunningDeadlineSeconds", DAY_SEC) < DAY_SEC:
        yield "deadline: a cluster of one size runs its job when every pod is there, and spot nodes may take hours"
    if spec.get("suspend") and (not shutdown or selector):
        yield "suspend: needs shutdownAfterJobFinishes and no clusterSelector"
    if QUEUE in labels:
        if not shutdown or selector:
            yield "queue: needs shutdownAfterJobFinishes and no clusterSelector"
        if cluster.get("enableInTreeAutoscaling"):
            yield "queue: Kueue takes no cluster that grows"
        if len(cluster.get("workerGroupSpecs", [])) > 7 or any(
            group["groupName"] == "head" for group in cluster.get("workerGroupSpecs", [])
        ):
            yield "queue: more than 7 groups, or one called head"
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "auth: Kubernetes' tokens are not for RayJobs"
    if "upgradeStrategy" in cluster:
        yield "cluster: upgradeStrategy in a RayJob's"
    submitter = spec.get("submitterPodTemplate")
    if submitter:
        yield from _secure("submitter", submitter["spec"])
        yield from _stays("submitter", submitter)
        if cluster and _spot({"template": submitter}) != _spot(cluster["headGroupSpec"]):
            yield "spot: what tells spot nodes differs between submitter and head"
    if mode == "K8sJobMode" and spec.get("submitterConfig", {}).get("backoffLimit", 2) < SUBMITTED_AGAIN:
        yield "submitter: given up after a few lost heads"


def _cluster(spec: Spec, ray_version: str) -> Iterator[str]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    autoscaling, v2 = spec.get("enableInTreeAutoscaling", False), spec.get("autoscalerOptions", {}).get("version") == "v2"
    pods = {"head": head, **{group["groupName"]: group for group in groups}}
    if spec.get("rayVersion") != ray_version:
        yield f"version: rayVersion {spec.get('rayVersion')}, and pyproject.toml says {ray_version}"
    if spec.get("authOptions", {}).get("mode") != "token" or _numbers(spec.get("rayVersion", "")) < (2, 52):
        yield "auth: mode token, of Ray 2.52 and later, is not there"
    if autoscaling and not v2:
        yield "autoscaler: not v2"
    patience = {each["name"]: each.get("value", "") for each in spec.get("autoscalerOptions", {}).get("env", [])}.get(ALLOCATE, HOUR_SEC)
    if autoscaling and any(group.get("priority") for group in groups) and not float(patience) < HOUR_SEC / 2:
        yield "autoscaler: a group whose nodes do not come is waited for so long that the next one is never asked"
    if v2 and any(each["name"] == "RAY_enable_autoscaler_v2" for each in _ray(head).get("env", [])):
        yield "autoscaler: version and RAY_enable_autoscaler_v2 both"
    options = spec.get("autoscalerOptions", {})
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscaler: idleTimeoutSeconds below 0"
    if any(each["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for each in options.get("env", [])):
        yield "autoscaler: KUBERAY_GEN_AUTOSCALER_START_CMD is KubeRay's"
    for key in sorted(GATED & set(spec)):
        yield f"cluster: {key} needs a feature gate that is off"
    if len(spot := {_spot(group) for group in pods.values()}) > 1:
        yield f"spot: what tells spot nodes differs: {', '.join(' '.join(each) for each in sorted(spot))}"
    for name, group in pods.items():
        pod, start = group["template"]["spec"], group.get("rayStartParams", {})
        if autoscaling and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy {pod['restartPolicy']} with autoscaler v2"
        if group.get("resources") and any(start.get(key) for key in OF_RAY):
            yield f"{name}: resources both in rayStartParams and in the group"
        if "labels" in start:
            yield f"{name}: labels in rayStartParams"
        yield from _pod(name, group["template"], ray_version)
    yield from _head(head)
    for group in groups:
        yield from _group(group, autoscaling, v2, spec.get("rayVersion", ""))
    if "decode" not in pods or not _on_spot(pods["decode"]):
        yield "decode: no group of CPUs on spot nodes"


def _head(head: Spec) -> Iterator[str]:
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'head: num-cpus is not "0"'
    names = {each["name"] for each in _ray(head).get("env", [])}
    if names & OF_REDIS or "redis-username" in head.get("rayStartParams", {}):
        yield "head: Redis belongs into gcsFaultToleranceOptions"
    yield from _stays("head", head["template"])
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        lost = [each for each in head["template"]["spec"].get("tolerations", []) if each.get("key") == key]
        if not lost or any(each.get("tolerationSeconds", float("inf")) > LOST_SEC for each in lost):
            yield f"head: {key}: a lost node is waited for"


def _stays(name: str, template: Spec) -> Iterator[str]:
    """On a node that is not taken away, by the cloud or by an autoscaler of nodes."""
    if not _on_demand({"template": template}):
        yield f"{name}: may be placed on a spot node"
    annotations = template.get("metadata", {}).get("annotations", {})
    for key, value in STAY.items():
        if annotations.get(key) != value:
            yield f"{name}: may be evicted: {key} is not {value}"


def _group(group: Spec, autoscaling: bool, v2: bool, ray_version: str) -> Iterator[str]:
    name, pod = group["groupName"], group["template"]["spec"]
    least, now, most = group.get("minReplicas"), group.get("replicas", 0), group.get("maxReplicas")
    if least is None or most is None or not 0 <= least <= now <= most:
        yield f"{name}: minReplicas {least}, replicas {now}, maxReplicas {most}"
    elif autoscaling and (least or now):
        yield f"{name}: does not start from zero"
    if group.get("priority") and (not v2 or _numbers(ray_version) < (2, 56)):
        yield f"{name}: priority without autoscaler v2, or of a Ray before 2.56"
    if "idleTimeoutSeconds" in group and (not v2 or group["idleTimeoutSeconds"] < 0):
        yield f"{name}: idleTimeoutSeconds without autoscaler v2, or below 0"
    if group.get("suspend") and autoscaling:
        yield f"{name}: suspended with autoscaling"
    limits = _ray(group)["resources"]["limits"]
    if "nvidia.com/gpu" in limits:
        if not any(
            each.get("key") == "nvidia.com/gpu" and each.get("effect") in (None, "NoSchedule") for each in pod.get("tolerations", [])
        ):
            yield f"{name}: no toleration of nvidia.com/gpu"
        if len(_expressions(group)) < 2 or _expressions(group)[1]["operator"] != "In":
            yield f"{name}: any type of GPU would do"
        elif _expressions(group)[1]["key"].startswith("nvidia.com/"):
            yield f"{name}: {_expressions(group)[1]['key']} is set on nodes that are there already, and no autoscaler of nodes makes one for it"
    elif group.get("priority"):
        yield f"{name}: priority without GPUs"
    if _on_spot(group) and not any(each.get("key") == _expressions(group)[0]["key"] for each in pod.get("tolerations", [])):
        yield f"{name}: no toleration of spot nodes"


def _pod(name: str, template: Spec, ray_version: str) -> Iterator[str]:
    pod = template["spec"]
    container = pod["containers"][0]
    yield from _secure(name, pod)
    for label in sorted(set(template.get("metadata", {}).get("labels", {})) & OF_KUBERAY):
        yield f"{name}: {label} is KubeRay's, whose services find pods by it"
    if not container["image"].endswith(f"ray{ray_version}"):
        yield f"version: {name} runs {container['image']}, and pyproject.toml says Ray {ray_version}"
    drain = float(next((each["value"] for each in container.get("env", []) if each["name"] == DRAIN), DRAIN_SEC))
    if pod.get("terminationGracePeriodSeconds", 30) <= drain:
        yield f"{name}: killed before Ray has drained it"
    mounted = {each["mountPath"]: each["name"] for each in container.get("volumeMounts", [])}
    volumes = {each["name"]: each for each in pod.get("volumes", [])}
    memory = volumes.get(mounted.get("/dev/shm", ""), {}).get("emptyDir", {})
    if memory.get("medium") != "Memory":
        yield f"{name}: /dev/shm is no memory volume"
    elif not OBJECT_STORE * _bytes(container["resources"]["limits"]["memory"]) <= _bytes(memory.get("sizeLimit", "0")):
        yield f"{name}: /dev/shm does not hold the object store"
    disks = [each["emptyDir"] for each in pod.get("volumes", []) if "emptyDir" in each and each["emptyDir"].get("medium") != "Memory"]
    if sum(_bytes(each.get("sizeLimit", "0")) for each in disks) > _bytes(container["resources"]["limits"].get("ephemeral-storage", "0")):
        yield f"{name}: its node need not have the disk that it may fill"
    if "persistentVolumeClaim" not in volumes.get(mounted.get("/shared", ""), {}):
        yield f"{name}: does not see the run folders"
    for probe in ("livenessProbe", "readinessProbe"):
        if probe not in container:
            yield f"{name}: no {probe}"
    if container["resources"].get("requests") != container["resources"].get("limits"):
        yield f"{name}: asks for less than it may take"


def _secure(name: str, pod: Spec) -> Iterator[str]:
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield f"{name}: may run as root"
    for container in pod["containers"]:
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            yield f"{name}: may gain privileges"
        for each in container.get("env", []):
            if re.search("KEY|SECRET|PASSWORD|TOKEN|CREDENTIAL", each["name"].upper()) and "value" in each:
                yield f"{name}: {each['name']} stands in the manifest itself"


def _ray(group: Spec) -> Spec:
    return group["template"]["spec"]["containers"][0]


def _expressions(group: Spec) -> list[Spec]:
    """Those of the one node selector term there is; with several, any would do."""
    node = group["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
    terms = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return terms[0]["matchExpressions"] if len(terms) == 1 else []


def _spot(group: Spec) -> tuple[str, ...]:
    """Label and values of the first expression, which is about spot nodes in every group."""
    first = (_expressions(group) or [{}])[0]
    return (first.get("key", ""), *first.get("values", []))


def _on_spot(group: Spec) -> bool:
    return bool(_expressions(group)) and _expressions(group)[0]["operator"] == "In"


def _on_demand(group: Spec) -> bool:
    return bool(_expressions(group)) and _expressions(group)[0]["operator"] == "NotIn"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _bytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]
