"""cluster.yaml passes Ray's own validation; the Kubernetes manifests and serve/config.yaml have the parts they need."""

import re
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from selma_ray.cluster.config import Role
from selma_ray.plan.nodes import node_groups
from selma_ray.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]
_L40S_BYTES = 48e9  # the card of AWS's g6e instances
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


def test_the_launchers_nodes_hold_what_the_recipe_of_its_first_lines_takes(cluster: dict[str, Any]) -> None:
    recipe = load_recipe(ROOT / "jobs" / "recipes" / "sdxl.yaml", [])
    for group in node_groups(recipe, _L40S_BYTES):
        node = cluster["available_node_types"][group.role]
        assert node["resources"]["CPU"] >= group.cpus
        assert node["resources"]["GPU"] == group.gpus
        assert node["max_workers"] >= group.fewest
        assert node["node_config"]["InstanceType"].startswith("g6e.")
        assert group.card_bytes < _L40S_BYTES


def test_the_launchers_autoscaler_heeds_labels(cluster: dict[str, Any]) -> None:
    assert "RAY_enable_autoscaler_v2=1 ray start --head" in cluster["head_start_ray_commands"][-1]


STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0")" in
  python) echo secret ;;
  ray) echo "HF_TOKEN=$HF_TOKEN" >> "$LOG" ;;
  sudo) "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("stage", "called", "variables"),
    [
        ("initialization_commands", ["sudo mkdir -p /opt/dlami/nvme", "sudo chmod 1777 /opt/dlami/nvme"], {}),
        ("setup_commands", ["pip install --no-deps -r requirements/gpu.txt", "pip install --no-deps ."], {}),
        ("head_start_ray_commands", ["python /home/ray/selma_ray/jobs/hub_token.py", "ray start --head"], {}),
        ("worker_start_ray_commands", ["ray start --address=10.0.0.1:6379"], {"RAY_HEAD_IP": "10.0.0.1"}),
    ],
)
def test_the_launchers_commands_run_with_what_a_node_knows(
    cluster: dict[str, Any], stage: str, called: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    for name in ("sudo", "mkdir", "chmod", "pip", "python", "ray"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    known = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "LOG": str(log), **variables}
    for command in cluster[stage]:
        there = command.replace("cd /home/ray/selma_ray", f"cd {ROOT}")
        done = subprocess.run(["bash", "-u", "-e", "-c", there], env=known, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
    assert all(line in log.read_text() for line in called)
    if "start_ray" in stage:
        assert log.read_text().endswith("HF_TOKEN=secret\n")
    assert "secret" not in "".join(cluster[stage])


def test_a_node_reads_its_token_where_it_may(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3
    from moto import mock_aws

    from jobs.hub_token import main

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-west-2")
    with mock_aws():
        boto3.client("ssm").put_parameter(Name="/selma/hf_token", Value="hf_x", Type="SecureString")
        assert main("/selma/hf_token") == "hf_x"
        assert main("/other") == ""
    assert "/other was not read (ParameterNotFound): gated models cannot be fetched here" in capsys.readouterr().err


def test_the_launchers_head_takes_no_tasks(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_the_launcher_installs_this_project_beside_the_pinned_ray(cluster: dict[str, Any]) -> None:
    assert any("requirements/gpu.txt && pip install --no-deps ." in command for command in cluster["setup_commands"])
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
