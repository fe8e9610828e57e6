"""configs/launch: recipes that no cluster is at hand for are at least well-formed, and name what is there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxdistill.config import RayConfig, ServerConfig

FOLDER = Path(__file__).parents[2] / "configs" / "launch"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path):
    bash = shutil.which("bash")
    assert bash
    assert subprocess.run([bash, "-n", path], check=False).returncode == 0


def test_the_kubernetes_recipe_holds_together():
    service, servers, job = yaml.safe_load_all((FOLDER / "vllm_kubernetes.yaml").read_text())
    assert servers["spec"]["serviceName"] == service["metadata"]["name"] == "vllm"
    pod = servers["spec"]["template"]
    assert pod["metadata"]["labels"] == servers["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][:2] == ["jaxdistill", "generate"]
    comment = (FOLDER / "vllm_kubernetes.yaml").read_text().split("urls: [")[1].split("]")[0]
    ServerConfig(urls=tuple(url.strip() for url in comment.split(",")))


def test_the_ray_recipe_holds_together():
    cluster, job = yaml.safe_load_all((FOLDER / "ray_kubernetes.yaml").read_text())
    head, (group,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    pods = [each["template"]["spec"] for each in (head, group, job["spec"])]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes >= {"runs", "models"}
    text = (FOLDER / "ray_kubernetes.yaml").read_text()
    sections = [yaml.safe_load("{" + part.split("}")[0] + "}") for part in text.split("ray: {")[1:3]]
    for section in sections:
        address = RayConfig(**section).address
        assert address == f"ray://{cluster['metadata']['name']}-head-svc:10001"
    ports = {port["name"]: port["containerPort"] for port in pods[0]["containers"][0]["ports"]}
    assert ports["client"] == 10001
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == RayConfig(**sections[0]).num_gpus
    assert group["maxReplicas"] == RayConfig(**sections[0]).workers


def test_the_ray_scripts_name_settings_that_exist():
    text = (FOLDER / "ray_slurm.sh").read_text()
    keys = {word.removeprefix("traces.ray.").split("=")[0] for word in text.split() if word.startswith("traces.ray.")}
    assert keys == {"address", "wait_s"}
    RayConfig(address="node1:6379", wait_s=600)
