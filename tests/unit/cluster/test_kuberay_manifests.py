"""The Kubernetes manifests against the schema of KubeRay's resources.

The schema of a CustomResourceDefinition is checked where its file is at hand: set KUBERAY_CRDS to the folder `crds` of KubeRay's Helm
chart. Everywhere else the fields that the manifests use are checked against the few that KubeRay 1.5 documents, written out here.
"""

import copy
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

KUBERAY = Path(__file__).resolve().parents[3] / "kuberay"
MANIFESTS = {"rayjob.yaml": "rayjobs", "rayservice.yaml": "rayservices"}
HELP = "KUBERAY_CRDS is not set to a folder of KubeRay's CustomResourceDefinitions (the folder crds of its Helm chart)"


def manifest(file: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / file).read_text())


def record(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": fields}


TEXT, WHOLE, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
WORDS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}}
VARIABLE = record(
    "name",
    name=TEXT,
    value=TEXT,
    valueFrom=record("secretKeyRef", secretKeyRef=record("name key", name=TEXT, key=TEXT, optional=TRUTH)),
)
CONTAINER = record(
    "name image resources",
    name=TEXT,
    image=TEXT,
    resources=record("requests limits", requests=QUANTITIES, limits=QUANTITIES),
    env={"type": "array", "items": VARIABLE},
    readinessProbe=record(
        "httpGet",
        httpGet=record("path port", path=TEXT, port=WHOLE),
        periodSeconds=WHOLE,
        timeoutSeconds=WHOLE,
        failureThreshold=WHOLE,
    ),
    ports={"type": "array", "items": record("containerPort", containerPort=WHOLE, name=TEXT)},
    volumeMounts={"type": "array", "items": record("name mountPath", name=TEXT, mountPath=TEXT, readOnly=TRUTH)},
)
VOLUME = record(
    "name",
    name=TEXT,
    emptyDir=record("sizeLimit", sizeLimit=TEXT),
    secret=record("secretName", secretName=TEXT),
)
PODS = record(
    "spec",
    spec=record(
        "containers",
        containers={"type": "array", "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
        serviceAccountName=TEXT,
        securityContext=record("fsGroup", fsGroup=WHOLE),
        tolerations={"type": "array", "items": record("key operator effect", key=TEXT, operator=TEXT, effect=TEXT)},
    ),
)
CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=record(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE),
    headGroupSpec=record("rayStartParams template", rayStartParams=WORDS, template=PODS),
    workerGroupSpecs={
        "type": "array",
        "items": record(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, labels=WORDS, rayStartParams=WORDS, template=PODS,
        ),
    },
)  # fmt: skip
SPECS = {
    "rayjob.yaml": record(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT, backoffLimit=WHOLE, shutdownAfterJobFinishes=TRUTH, ttlSecondsAfterFinished=WHOLE, rayClusterSpec=CLUSTER,
    ),
    "rayservice.yaml": record("serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=CLUSTER),
}  # fmt: skip


@pytest.mark.parametrize("file", MANIFESTS)
def test_every_field_is_one_that_kuberay_documents(file: str) -> None:
    content = manifest(file)
    assert content.keys() == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.validate(content["spec"], SPECS[file])
    cluster = content["spec"].get("rayClusterSpec") or content["spec"]["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    misspelt = copy.deepcopy(content["spec"])
    (misspelt.get("rayClusterSpec") or misspelt["rayClusterConfig"])["workerGroupSpecs"][0]["label"] = {}
    with pytest.raises(jsonschema.ValidationError, match="label"):
        jsonschema.validate(misspelt, SPECS[file])


def strict(schema: Any) -> Any:
    """Return a CustomResourceDefinition's schema as JSON Schema that refuses what the API server would drop without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("type") == "object" and "properties" in schema:
        changed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    if schema.get("nullable") and "type" in schema:
        changed["type"] = [schema["type"], "null"]
    return changed


def validate(content: dict[str, Any], definition: dict[str, Any]) -> None:
    version = content["apiVersion"].partition("/")[2]
    schemas = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
    assert content["kind"] == definition["spec"]["names"]["kind"]
    schema = strict(schemas[version])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    jsonschema.validate(content, schema)


@pytest.mark.parametrize(("file", "plural"), MANIFESTS.items())
def test_manifests_fit_the_published_definition(file: str, plural: str) -> None:
    folder = os.environ.get("KUBERAY_CRDS")
    if folder is None:
        pytest.skip(HELP)
    validate(manifest(file), yaml.safe_load(Path(folder, f"ray.io_{plural}.yaml").read_text()))


def test_what_a_definition_does_not_know_is_refused() -> None:
    known = {
        "type": "object",
        "required": ["size"],
        "properties": {
            "size": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
            "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "note": {"type": "string", "nullable": True},
        },
    }
    top = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}, "spec": known}
    definition = {"spec": {"names": {"kind": "RayThing"}, "versions": [{"name": "v1", "schema": {"openAPIV3Schema": {
        "type": "object", "properties": top}}}]}}  # fmt: skip
    thing = {"apiVersion": "ray.io/v1", "kind": "RayThing", "metadata": {"name": "x"}}
    good = {"size": "2", "free": {"a": 1}, "labels": {"role": "serve"}, "note": None}
    validate(thing | {"spec": good}, definition)
    wrong: list[dict[str, Any]] = [{**good, "sise": 1}, {"free": {}}, {**good, "labels": {"role": 1}}]
    for bad in wrong:
        with pytest.raises(jsonschema.ValidationError):
            validate(thing | {"spec": bad}, definition)
