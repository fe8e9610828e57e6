"""configs/launch: recipes that no cluster is at hand for are at least well-formed, and name what is there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxdistill.config import ServerConfig

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
