"""The container file and the Kubernetes manifest: their restrictions, and that what they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fakes import guide
from interceptd.cli import main

ROOT = Path(__file__).parents[2]
CONTAINERFILE = (ROOT / "deploy" / "container" / "Containerfile").read_text()
MANIFEST = ROOT / "deploy" / "kubernetes" / "daemonset.yaml"
SCRAPES = ROOT / "deploy" / "prometheus" / "kubernetes.yml"
RESOURCES: dict[str, Any] = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}
POD: dict[str, Any] = RESOURCES["DaemonSet"]["spec"]["template"]
[DAEMON] = POD["spec"]["containers"]
ENVIRONMENT = dict(re.findall(r"(\w+)=(\S+)", CONTAINERFILE[CONTAINERFILE.index("\nENV ") :]))
POD_NAMESPACE = RESOURCES["DaemonSet"]["metadata"]["namespace"]
VALIDATE = Path(sys.executable).with_name("kubernetes-validate")
PROMTOOL, KUBECTL = shutil.which("promtool"), shutil.which("kubectl")


def test_the_container_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", CONTAINERFILE, re.MULTILINE)
    assert users == [("65532", "65532")]
    assert CONTAINERFILE.index("\nUSER") < CONTAINERFILE.index("\nENTRYPOINT")


def test_the_container_compiles_the_standard_library_of_the_python_that_it_runs() -> None:
    line = re.search(r"^RUN python -m compileall -q (.+)$", CONTAINERFILE, re.MULTILINE)
    assert line is not None
    assert CONTAINERFILE.rindex("\nFROM") < line.start() < CONTAINERFILE.index("\nUSER")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    named = subprocess.check_output(["sh", "-c", f"echo {line[1]}"], text=True, env={"PATH": path})
    assert (Path(named.strip()) / "asyncio").is_dir()


def instruction(name: str) -> str:
    [found] = re.findall(rf"^{name} (.+)$", CONTAINERFILE, re.MULTILINE)
    return str(found)


def test_the_containers_first_process_keeps_a_daemon_and_arguments_take_nothing_from_it() -> None:
    """They would replace a CMD: the daemon then served elsewhere, with the defaults."""
    *keeps, config = json.loads(instruction("ENTRYPOINT"))
    assert keeps == ["interceptd", "keep", "--", "serve", "--config"]
    assert f"COPY deploy/interceptd.toml {config}\n" in CONTAINERFILE
    assert re.findall(r"^CMD\b", CONTAINERFILE, re.MULTILINE) == []
    assert {"command", "args", "env"}.isdisjoint(DAEMON)


def test_the_operators_and_the_vmms_socket_are_where_their_users_look() -> None:
    """`interceptctl` and its doctor, which are asked by `podman exec`; both on a read-only file system."""
    assert ENVIRONMENT["INTERCEPTCTL_SOCKET"] == ENVIRONMENT["INTERCEPTD_OPERATOR_SOCKET"]
    sockets = [ENVIRONMENT[name] for name in ("INTERCEPTD_SOCKET", "INTERCEPTD_OPERATOR_SOCKET")]
    assert instruction("VOLUME").split() == [str(Path(socket).parent) for socket in sockets]


def test_everything_that_the_container_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", CONTAINERFILE, re.MULTILINE)
    missing = [path for line in copied for path in line.split() if not (ROOT / path).exists()]
    assert (len(copied), missing) == (5, [])


def test_the_manifest_is_valid_strictly() -> None:
    command = [str(VALIDATE), "--strict", str(MANIFEST)]
    validated = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT, timeout=60, check=False
    )
    assert (validated.returncode, validated.stdout.count(" passed ")) == (0, 4)


@pytest.mark.parametrize("wanted", ["hostPID: true", "privileged: true", "runAsUser: 0", "add:", "runAsRoot"])
def test_the_manifest_requests_no_privilege(wanted: str) -> None:
    assert wanted not in MANIFEST.read_text()


def test_the_manifest_says_nothing_twice() -> None:
    """A parser takes the last of two equal keys, and says nothing."""

    def mappings(node: Any) -> Iterator[Any]:
        if isinstance(node, yaml.MappingNode):
            yield node
        if not isinstance(node, yaml.ScalarNode):
            for child in node.value:
                for each in child if isinstance(child, tuple) else (child,):
                    yield from mappings(each)

    for file in (MANIFEST, SCRAPES):
        for document in yaml.compose_all(file.read_text()):
            for mapping in mappings(document):
                keys = [key.value for key, _ in mapping.value]
                assert (sorted(set(keys)), mapping.start_mark.line) == (sorted(keys), mapping.start_mark.line)


def test_the_manifest_shares_the_vmms_socket_and_not_the_operators() -> None:
    volumes = {volume.pop("name"): set(volume) for volume in map(dict, POD["spec"]["volumes"])}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in DAEMON["volumeMounts"]}
    config = json.loads(instruction("ENTRYPOINT"))[-1]
    assert mounts == {
        str(Path(ENVIRONMENT["INTERCEPTD_SOCKET"]).parent): {"hostPath"},
        str(Path(ENVIRONMENT["INTERCEPTD_OPERATOR_SOCKET"]).parent): {"emptyDir"},
        str(Path(config).parent): {"configMap"},
    }


def test_only_prometheus_reaches_the_pods_and_they_reach_nobody() -> None:
    policy = RESOURCES["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= POD["metadata"]["labels"].items()
    assert (policy["policyTypes"], "egress" in policy) == (["Ingress", "Egress"], False)
    [rule] = policy["ingress"]
    assert [port["port"] for port in rule["ports"]] == [port["name"] for port in DAEMON["ports"]]


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's prometheus package")
def test_a_pod_is_scraped_once_as_the_job_of_the_alerts_and_by_the_name_of_its_node(tmp_path: Path) -> None:
    """What Kubernetes says of the pods is made up: Debian's promtool knows no Kubernetes."""
    [job] = yaml.safe_load(SCRAPES.read_text())["scrape_configs"]
    [discovery] = job.pop("kubernetes_sd_configs")
    assert discovery == {"role": "pod", "namespaces": {"names": [POD_NAMESPACE]}}
    job["static_configs"] = [
        {
            "targets": ["10.0.0.7:9477"],
            "labels": {
                "__meta_kubernetes_pod_node_name": "worker-1",
                "__meta_kubernetes_pod_container_port_name": port,
            },
        }
        for port in ("metrics", "of-a-sidecar")
    ]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    for seconds in (1, 10, 60):  # it always takes that long, so begin with what a fast machine needs
        timeout = f"--timeout={seconds}s"
        command = [str(PROMTOOL), "check", "service-discovery", timeout, str(file), job["job_name"]]
        if found := json.loads(subprocess.check_output(command)):
            break
    labels = [each["labels"] for each in found if each["labels"]]
    assert [(each["job"], each["instance"]) for each in labels] == [("interceptd", "worker-1")]


def test_every_probe_of_the_manifest_needs_the_event_loop() -> None:
    """The health command as it starts, then what costs no process: /healthz."""
    assert DAEMON["startupProbe"]["exec"] == {"command": ["interceptctl", "health"]}
    for name in ("readinessProbe", "livenessProbe"):
        assert DAEMON[name]["httpGet"] == {"path": "/healthz", "port": "metrics"}


def test_the_port_of_the_metrics_is_one_everywhere() -> None:
    listens = re.findall(
        r'metrics.listen = "0.0.0.0:(\d+)"', RESOURCES["ConfigMap"]["data"]["interceptd.toml"]
    )
    assert [port["containerPort"] for port in DAEMON["ports"]] == [int(port) for port in listens] == [9477]
    assert instruction("EXPOSE") == "9477"


def test_the_configuration_in_the_manifest_is_one_that_the_daemon_takes(tmp_path: Path) -> None:
    file = tmp_path / "interceptd.toml"
    file.write_text(RESOURCES["ConfigMap"]["data"]["interceptd.toml"])
    checked = CliRunner().invoke(main, ["check-config", str(file)])
    assert (checked.exit_code, checked.stderr) == (0, "")
    assert "uids 107, 65532" in checked.stdout
    assert "metrics at 0.0.0.0:9477" in checked.stdout


def kubectl_commands() -> list[str]:
    return [command for command in guide.commands("Kubernetes") if command.startswith("kubectl ")]


@pytest.mark.skipif(KUBECTL is None, reason="needs kubectl, of Debian's kubernetes-client package")
@pytest.mark.parametrize("command", kubectl_commands())
def test_kubectl_takes_the_guides_command_as_far_as_the_cluster(command: str) -> None:
    """There is none here, so what it would answer is not tested."""
    filled = command.replace("POD", "pod/interceptd-x2x4x").replace("NODE", "worker-1")
    nowhere = ["--kubeconfig=/dev/null", "--server=http://127.0.0.1:1"]
    asked = subprocess.run(
        [str(KUBECTL), *nowhere, *shlex.split(filled)[1:]],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (asked.returncode, "refused" in asked.stderr, "unknown" in asked.stderr) == (1, True, False)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("systemd-tmpfiles") is None,
    reason="the command is for root, and needs Debian's systemd",
)
def test_the_guides_command_for_a_node_makes_a_directory_that_the_pod_may_write_to() -> None:
    """As it is written, in a mount namespace where no other program has asked for directories."""
    [command] = [command for command in guide.commands("Kubernetes") if "tmpfiles" in command]
    hides = "for place in /etc/tmpfiles.d /usr/lib/tmpfiles.d /run; do mount -t tmpfs tmpfs $place; done"
    shows = "stat --format='%F %u %g %a' /run/interceptd-vmm"
    shown = subprocess.check_output(
        ["unshare", "--mount", "sh", "-e", "-c", f"{hides}\n{command}\n{shows}"], text=True
    )
    pod = POD["spec"]["securityContext"]
    assert shown == f"directory {pod['runAsUser']} {pod['runAsGroup']} 755\n"
    assert [v["hostPath"] for v in POD["spec"]["volumes"] if "hostPath" in v] == [
        {"path": "/run/interceptd-vmm", "type": "Directory"}
    ]
