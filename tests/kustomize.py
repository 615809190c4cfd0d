"""Renders a kustomization as `kubectl kustomize` does, for the subset of it that `cluster/` uses; anything else is refused.

The subset: resources (files and folders of kustomizations), components, JSON patches at a kind, namespace, images, ConfigMaps of
literals without a suffix, and replacements of whole fields. What is marked as local configuration is left out, as it is there.
`test_cluster.py` holds it against the real one where that is installed.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]
LOCAL = "config.kubernetes.io/local-config"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there
KEYS = {"apiVersion", "kind", "resources", "components", "patches", "namespace", "images", "configMapGenerator", "replacements"}


class Unknown(Exception):
    """The kustomization asks for what this renderer does not do, or for what is not there."""


def render(folder: Path) -> list[Resource]:
    """The resources of the kustomization in a folder, as `kubectl apply -k` sends them."""
    found = _accumulate(folder, [], "Kustomization")
    return [resource for resource in found if resource["metadata"].get("annotations", {}).get(LOCAL) != "true"]


def _accumulate(folder: Path, given: list[Resource], kind: str) -> list[Resource]:
    spec = yaml.load((folder / "kustomization.yaml").read_text(), LOADER)
    _only(spec, KEYS, folder)
    if spec["kind"] != kind:
        raise Unknown(f"{folder}: a {spec['kind']} stands where a {kind} is wanted")
    found = list(given)
    for name in spec.get("resources", []):
        path = folder / name
        found += _accumulate(path, [], "Kustomization") if path.is_dir() else list(yaml.load_all(path.read_text(), LOADER))
    for name in spec.get("components", []):
        found = _accumulate(folder / name, found, "Component")
    found += [_config_map(each, folder) for each in spec.get("configMapGenerator", [])]
    for patch in spec.get("patches", []):
        _only(patch, {"target", "patch"}, folder)
        for resource in _selected(found, patch["target"], folder):
            _patch(resource, yaml.load(patch["patch"], LOADER), folder)
    if "namespace" in spec:
        for resource in found:
            resource["metadata"]["namespace"] = spec["namespace"]
    for image in spec.get("images", []):
        _only(image, {"name", "newName", "newTag"}, folder)
        for resource in found:
            _set_image(resource, image)
    for replacement in spec.get("replacements", []):
        _replace(found, replacement, folder)
    return found


def _only(spec: dict[str, Any], known: set[str], folder: Path) -> None:
    if unknown := set(spec) - known:
        raise Unknown(f"{folder}: {', '.join(sorted(unknown))}")


def _config_map(spec: dict[str, Any], folder: Path) -> Resource:
    _only(spec, {"name", "options", "literals"}, folder)
    _only(spec["options"], {"disableNameSuffixHash", "annotations"}, folder)
    if spec["options"].get("disableNameSuffixHash") is not True:
        raise Unknown(f"{folder}: names with a suffix")
    metadata = {"name": spec["name"], "annotations": spec["options"].get("annotations", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(each.split("=", 1) for each in spec["literals"])}


def _selected(found: list[Resource], select: dict[str, str], folder: Path) -> list[Resource]:
    _only(select, {"kind", "labelSelector"}, folder)
    label = select.get("labelSelector")
    if label is not None and not re.fullmatch(r"[\w./-]+", label):
        raise Unknown(f"{folder}: labelSelector: {label}")
    return [
        each for each in found if each["kind"] == select["kind"] and (label is None or label in each["metadata"].get("labels", {}))
    ]  # fmt: skip


def _patch(resource: Resource, operations: list[dict[str, Any]], folder: Path) -> None:
    for operation in operations:
        _only(operation, {"op", "path", "value"}, folder)
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        node: Any = resource
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        if operation["op"] not in ("add", "replace") or isinstance(node, list):
            raise Unknown(f"{folder}: {operation}")
        if operation["op"] == "replace" and last not in node:
            raise Unknown(f"{folder}: {operation['path']} is not there to be replaced")
        node[last] = copy.deepcopy(operation["value"])


def _set_image(node: Any, image: dict[str, str]) -> None:
    """In every list of containers or init containers, at whatever depth: so does kustomize, which knows no custom resources."""
    if isinstance(node, dict):
        for key, value in node.items():
            for each in value if key in ("containers", "initContainers") and isinstance(value, list) else []:
                name, _, tag = each.get("image", "").partition(":")
                if name == image["name"]:
                    new = image.get("newTag", tag)
                    each["image"] = image.get("newName", name) + (f":{new}" if new else "")
            _set_image(value, image)
    elif isinstance(node, list):
        for each in node:
            _set_image(each, image)


def _replace(found: list[Resource], replacement: dict[str, Any], folder: Path) -> None:
    _only(replacement, {"source", "targets"}, folder)
    source = replacement["source"]
    _only(source, {"kind", "name", "fieldPath"}, folder)
    (origin,) = [each for each in found if each["kind"] == source["kind"] and each["metadata"]["name"] == source["name"]]
    ((parent, key),) = _places(origin, source["fieldPath"], folder)
    for target in replacement["targets"]:
        _only(target, {"select", "fieldPaths"}, folder)
        for resource in _selected(found, target["select"], folder):
            for path in target["fieldPaths"]:
                for node, last in _places(resource, path, folder):
                    node[last] = parent[key]


def _places(resource: Resource, path: str, folder: Path) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every field that a path names; `*` is every element, `[key]` a key with dots.

    `[key=value]` is every element whose value the pattern is found in: kustomize takes it for one, and `gpu` finds `gpu-on-demand`.
    """
    places: list[tuple[Any, Any]] = [({"": resource}, "")]
    for part in re.findall(r"\[[^\]]*\]|[^.]+", path):
        nodes, places = [parent[key] for parent, key in places], []
        for node in nodes:
            key, equals, value = part.strip("[]").partition("=")
            if isinstance(node, list):
                chosen = [
                    index
                    for index, each in enumerate(node)
                    if part == "*" or (equals and re.search(value, str(each.get(key, "")))) or (part.isdigit() and index == int(part))
                ]
            else:
                chosen = [key] if key in node and not equals else []
            places += [(node, each) for each in chosen]
        if not places:
            raise Unknown(f"{folder}: {resource['kind']} {resource['metadata']['name']} has no {path}")
    yield from places
