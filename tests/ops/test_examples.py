"""The manifests and profiles that are handed out: valid by Kubernetes' own schema, and by our own code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from slime_async.cli.common import add_role_arguments
from slime_async.cli.flags import FlagParser
from slime_async.cli.main import COMMANDS
from slime_async.cli.train import add_arguments as add_train_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"
MANIFESTS = sorted((EXAMPLES / "kubernetes").glob("*.yaml"))
KUBERNETES = "1.31"
"""Any that is in use: what is used here is in all of them"""


def documents() -> Iterator[Any]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.stem}: {document['kind']} {document['metadata']['name']}")


def containers() -> list[Any]:
    jobs = [document.values[0] for document in documents() if document.values[0]["kind"] == "Job"]
    return [container for job in jobs for container in job["spec"]["template"]["spec"]["containers"]]


@pytest.mark.parametrize("document", list(documents()))
def test_kubernetes_would_take_a_manifest(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("container", containers(), ids=lambda container: str(container["name"]))
def test_a_containers_command_line_is_one_of_ours(container: dict[str, Any]) -> None:
    words = [*container["command"], *container["args"]]
    if words[0] == "torchrun":
        words = words[words.index("slime_async.cli.main") :]
    command, flags = words[1], words[2:]
    assert command in COMMANDS
    parser = FlagParser(prog=command, allow_abbrev=False)
    if command == "train":
        add_train_arguments(parser)
    else:
        add_role_arguments(parser, needs_hub=command != "hub")
        parser.add_argument("--name")
    parsed = parser.parse_strictly(flags)
    assert str(parsed.run_directory) == "/runs/demo"


def test_secrets_are_mounted_and_never_written_down() -> None:
    for container in containers():
        assert "--hub.keys=/keys" in container["args"]
        assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in container["volumeMounts"]
    for path in MANIFESTS:
        assert "kind: Secret" not in path.read_text()


def test_an_actor_has_more_time_to_drain_than_it_takes() -> None:
    from slime_async.config import Config

    [actors] = [d.values[0] for d in documents() if d.values[0]["metadata"]["name"] == "slime-actors"]
    assert actors["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > Config().actor.drain_timeout_s
