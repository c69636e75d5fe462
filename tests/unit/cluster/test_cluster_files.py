"""cluster.yaml passes Ray's own validation; the Kubernetes manifests and serve/config.yaml have the parts they need."""

import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from selma_ray.cluster.config import Role

ROOT = Path(__file__).resolve().parents[3]
ROLES = set(typing.get_args(Role))


def ray_version() -> str:
    match = re.search(r'"ray\[[^]]*\]==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert match
    return match.group(1)


def load(*parts: str) -> dict[str, Any]:
    return yaml.safe_load(ROOT.joinpath(*parts).read_text())


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load("cluster.yaml"))
    validate_config(prepared)
    return prepared


def test_a_worker_group_of_the_launcher_bears_every_role(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"]
    assert {name: group.get("labels") for name, group in groups.items() if name != "head"} == {
        role: {"role": role} for role in ROLES
    }
    assert all(
        group["min_workers"] == 0 and group["max_workers"] > 0 for name, group in groups.items() if name != "head"
    )


def test_the_launchers_autoscaler_heeds_labels(cluster: dict[str, Any]) -> None:
    assert cluster["head_start_ray_commands"][-1].startswith("RAY_enable_autoscaler_v2=1 ray start --head")


def test_the_launchers_head_takes_no_tasks(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_the_launcher_installs_this_project_beside_the_pinned_ray(cluster: dict[str, Any]) -> None:
    assert any('pip install ".[gpu]"' in command for command in cluster["setup_commands"])
    assert f":{ray_version()}-" in cluster["docker"]["worker_image"]


@pytest.mark.parametrize(
    ("file", "kind", "spec_key", "roles"),
    [
        ("rayjob.yaml", "RayJob", "rayClusterSpec", ROLES),
        ("rayservice.yaml", "RayService", "rayClusterConfig", {"serve"}),
    ],
)
def test_kubernetes_manifests(file: str, kind: str, spec_key: str, roles: set[str]) -> None:
    manifest = load("kuberay", file)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    cluster = manifest["spec"][spec_key]
    assert cluster["rayVersion"] == ray_version()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {name: group["labels"] for name, group in groups.items()} == {role: {"role": role} for role in roles}
    for group in (cluster["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    "config",
    [load("serve", "config.yaml"), yaml.safe_load(load("kuberay", "rayservice.yaml")["spec"]["serveConfigV2"])],
    ids=["serve", "kuberay"],
)
def test_serve_configs_pass_rays_schema_and_our_own(config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import ServeArgs

    deployed = ServeDeploySchema.model_validate(config)
    (application,) = deployed.applications
    assert application.import_path == "serve.app:build"
    arguments = ServeArgs.model_validate(application.args)
    assert arguments.host == deployed.http_options.host
