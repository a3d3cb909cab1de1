"""The image and the DaemonSet's pod, run by podman: who is served, what goes on, and the guide's commands.

There is no cluster here: podman makes the pod, and what a kubelet does to it is done by the tests.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from fakes import guide
from fakes.contained_vmm import ContainedVmm, serve_round
from fakes.container_host import BUILD_SECONDS, IMAGE, REPOSITORY, ContainerHost, NoBase, obstacle
from fakes.eventually import PATIENCE, eventually
from fakes.surviving_vmm import Mode, SurvivingVmm
from intercept_client import ConnectionLost

pytestmark = [
    pytest.mark.verify,
    pytest.mark.alone,  # one build is for all of them
    pytest.mark.skipif(bool(obstacle()), reason=obstacle()),
]

CONFINED: Final = ("--cap-drop=all", "--read-only", "--network=none")
VOLUME: Final = "interceptd-vmm"
VMM_UID: Final = 107
ALL_UIDS: Final = f"allowed_uids=[0, {VMM_UID}, 65532]"
MIB: Final = 1 << 20
MANIFEST: Final = REPOSITORY / "deploy/kubernetes/daemonset.yaml"
POD: Final = "interceptd-interceptd"
"""What podman calls the container of that name in the pod of that name."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHost]:
    """With the image."""
    with ContainerHost(tmp_path_factory.mktemp("host")) as host:
        try:
            host.build()
        except NoBase as why:
            pytest.skip(str(why))
        yield host


@pytest.fixture(autouse=True)
def emptied(host: ContainerHost) -> Iterator[None]:
    """No test finds another's containers."""
    yield
    print(host.logs())
    host.podman("pod", "rm", "--all", "--force", "--time=0")
    host.podman("rm", "--all", "--force", "--time=0")
    host.podman("volume", "rm", "--all", "--force")


def start(host: ContainerHost, *arguments: str, options: tuple[str, ...] = ()) -> None:
    """A daemon that serves its volume, in a container of the name `daemon`."""
    confined = (*CONFINED, "--memory=256m", f"--volume={VOLUME}:/run/interceptd/vmm")
    host.podman("run", "--detach", "--name=daemon", *confined, *options, IMAGE, *arguments)
    wait_logged(host, "daemon", "daemon_started")


def wait_logged(host: ContainerHost, container: str, event: str, times: int = 1) -> list[dict[str, Any]]:
    eventually(lambda: len(host.log(container, event)) >= times, True)
    return host.log(container, event)


def status_of(host: ContainerHost, container: str) -> Mapping[str, str]:
    """Of its first process, from /proc."""
    text = host.podman("exec", container, "cat", "/proc/1/status")
    return dict(re.findall(r"^(\w+):\s+(\S+)", text, re.MULTILINE))


def memory_limit(host: ContainerHost, container: str) -> int:
    return int(host.podman("exec", container, "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_confined(host: ContainerHost, container: str) -> None:
    status = status_of(host, container)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["Uid"], status["Gid"]) == ("65532", "65532")
    assert host.podman("inspect", "--format={{.HostConfig.ReadonlyRootfs}}", container) == "true\n"


# ------------------------------------------------ the image


def test_vmms_on_the_host_and_in_another_container_are_served_by_each_daemon_until_the_stop(
    host: ContainerHost, tmp_path: Path
) -> None:
    """A restart and a kill of the daemon are followed by another in the same container."""
    start(host, "--set", ALL_UIDS, "--set", "socket_mode=0o666")
    check_confined(host, "daemon")
    assert memory_limit(host, "daemon") == 256 * MIB
    with ExitStack() as opened:
        beside = opened.enter_context(SurvivingVmm(host.volume(VOLUME) / "vmm.sock", Mode.WATCHED))
        contained = [
            opened.enter_context(ContainedVmm(host, tmp_path, mode, volume=VOLUME, uid=VMM_UID))
            for mode in (Mode.DECLARED, Mode.ANNOUNCED)
        ]

        def rounds() -> set[str]:
            return {serve_round(beside), *(vmm.serve_round() for vmm in contained)}

        assert rounds() == {"served, restarts 0"}
        host.podman("kill", "--signal=USR1", "daemon")
        wait_logged(host, "daemon", "daemon_restarted")
        assert rounds() == {"served, restarts 1"}
        host.podman("exec", "daemon", "sh", "-c", f"kill -KILL {host.daemon_pid('daemon')}")
        wait_logged(host, "daemon", "daemon_restarted", 2)
        assert rounds() == {"served, restarts 2"}

        host.podman("stop", "daemon")
        with pytest.raises(ConnectionLost):
            beside.vmm.statistics()
        [drain] = host.log("daemon", "drain_started")
        assert (drain["partitions"], len(host.log("daemon", "daemon_ended"))) == (3, 1)
        assert host.podman("inspect", "--format={{.State.ExitCode}}", "daemon") == "0\n"


def test_arguments_leave_the_sockets_and_the_configuration_as_they_are(
    host: ContainerHost, tmp_path: Path
) -> None:
    (tmp_path / "interceptd.toml").write_text("limits.operators = 7")
    options = (f"--volume={tmp_path}:/etc/interceptd:ro",)
    tmp_path.chmod(0o755)
    start(host, "--set", "limits.vmms_per_uid=5", options=options)
    said = host.podman("exec", "daemon", "interceptctl", "stats", "--json")
    assert '"partitions": 0' in said
    assert (host.volume(VOLUME) / "vmm.sock").is_socket()
    [started] = host.log("daemon", "daemon_started")
    assert started["socket"] == "/run/interceptd/vmm/vmm.sock"
    assert started["operator_socket"] == "/run/interceptd/operator/operator.sock"
    (tmp_path / "interceptd.toml").write_text("limits.operators = 6")
    host.podman("kill", "--signal=HUP", "daemon")
    [reloaded] = wait_logged(host, "daemon", "configuration_reloaded")
    assert reloaded["changed"] == ["limits.operators: 7 -> 6"]


def test_a_container_that_was_killed_starts_again_over_the_sockets_that_it_left(host: ContainerHost) -> None:
    start(host)
    host.podman("kill", "--signal=KILL", "daemon")
    host.podman("wait", "daemon")
    assert (host.volume(VOLUME) / "vmm.sock").is_socket()
    host.podman("start", "daemon")
    wait_logged(host, "daemon", "daemon_started", 2)
    host.podman("healthcheck", "run", "daemon")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "/etc/interceptd/interceptd.toml: cannot be read"),
        (("interceptctl", "health"), "Usage: "),
        (("other.toml",), "two configuration files: other.toml and --config"),
    ],
    ids=["no file", "a command", "another file"],
)
def test_a_daemon_without_its_configuration_does_not_start(
    host: ContainerHost, tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    mounted = () if arguments else (f"--volume={tmp_path}:/etc/interceptd:ro",)
    tmp_path.chmod(0o755)
    host.podman("run", "--name=daemon", *CONFINED, *mounted, IMAGE, *arguments, status=None)
    assert host.podman("inspect", "--format={{.State.ExitCode}}", "daemon") in ("1\n", "2\n")
    assert complaint in host.logs()
    assert host.log("daemon", "daemon_started") == []


def test_the_health_command_of_the_image_asks_the_daemon(host: ContainerHost) -> None:
    start(host)
    host.podman("healthcheck", "run", "daemon")
    host.podman("exec", "daemon", "sh", "-c", f"kill -STOP {host.daemon_pid('daemon')}")
    said = host.podman("healthcheck", "run", "daemon", status=1)
    assert said == "unhealthy\n"


def test_doctor_in_the_image_looks_at_both_sockets_and_blames_no_kernel_for_a_device(
    host: ContainerHost,
) -> None:
    start(host)
    findings = yaml.safe_load(host.podman("exec", "daemon", "interceptctl", "doctor", "--json", status=None))
    found = {each["name"]: each for each in findings["findings"]}
    assert (found["operator socket"]["state"], found["VMM socket"]["state"]) == ("ok", "ok")
    for device in ("/dev/kvm", "/dev/userfaultfd"):
        assert found[device]["found"].startswith("no such file, though the kernel offers the device")
        assert found[device]["fix"] == f"in a container: --device {device}"


# ------------------------------------------------ the pod


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The directory that a node has for the VMMs' socket."""
    place = tmp_path / "interceptd-vmm"
    place.mkdir(0o755)
    tmp_path.chmod(0o755)
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump_all(pod_of_the_daemonset(place)))
    subprocess.run(["chown", "65532:65532", str(place)], check=True)
    return place


def pod_of_the_daemonset(node: Path) -> list[Any]:
    """As its controller makes it, with what it names; the node's directory is elsewhere."""
    resources = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}
    template = resources["DaemonSet"]["spec"]["template"]
    for volume in template["spec"]["volumes"]:
        if "hostPath" in volume:
            volume["hostPath"]["path"] = str(node)
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"]["name"] = "interceptd"
    return [resources["ConfigMap"], pod]


def play(host: ContainerHost, node: Path) -> Mapping[str, Any]:
    """Start the pod; its one container as the manifest describes it."""
    file = node.with_name("pod.yaml")
    host.podman("kube", "play", "--network=slirp4netns", str(file))
    wait_logged(host, POD, "metrics_served")
    pod = list(yaml.safe_load_all(file.read_text()))[1]
    [container] = pod["spec"]["containers"]
    return dict(container)


def probe(host: ContainerHost, container: Mapping[str, Any], probe: Mapping[str, Any]) -> None:
    """What a kubelet does: a command in the container, or a request from outside."""
    if "exec" in probe:
        host.podman("exec", POD, *probe["exec"]["command"])
        return
    get = probe["httpGet"]
    [port] = [each["containerPort"] for each in container["ports"] if each["name"] == get["port"]]
    asks = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}{get['path']}')"
    subprocess.run(host.enter(sys.executable, "-c", asks), check=True, timeout=PATIENCE)


def test_the_pod_of_the_daemonset_answers_its_probes_and_serves_a_vmm_of_the_node(
    host: ContainerHost, node: Path, tmp_path: Path
) -> None:
    container = play(host, node)
    check_confined(host, POD)
    assert status_of(host, POD)["NoNewPrivs"] == "1"
    assert container["resources"]["limits"]["memory"] == "1Gi"
    assert memory_limit(host, POD) == 1024 * MIB
    told = host.podman("exec", POD, "interceptd", "check-config", "/etc/interceptd/interceptd.toml")
    assert re.search(r"^limits.memory_mib = 768 +# default$", told, re.MULTILINE)
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe(host, container, container[name])
    with ContainedVmm(host, tmp_path, Mode.DECLARED, volume=str(node), uid=VMM_UID) as vmm:
        assert vmm.serve_round() == "served, restarts 0"
        host.podman("exec", POD, "sh", "-c", f"kill -KILL {host.daemon_pid(POD)}")
        assert vmm.serve_round() == "served, restarts 1"
        host.podman("pod", "stop", "interceptd")
        [drain] = host.log(POD, "drain_started")
        assert drain["partitions"] == 1


# ------------------------------------------------ the guide


def test_the_guides_commands_for_containers_work_as_written(host: ContainerHost) -> None:
    waits = {
        "podman run -d": "daemon_started",
        "podman kill --signal USR1": "daemon_restarted",
        "podman kill --signal HUP": "configuration_reloaded",
    }
    commands = guide.commands("Container")
    assert len(commands) > 10
    for command in commands:
        ended = subprocess.run(
            ["bash", "-c", f'PATH="{host.commands}:$PATH"; {command}'],
            cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS,
        )  # fmt: skip
        assert (command, ended.returncode) == (command, 0), ended.stdout + ended.stderr
        for beginning, event in waits.items():
            if command.startswith(beginning):
                wait_logged(host, "interceptd", event)  # no reader is faster


def test_what_the_guide_has_kubectl_run_in_a_pod_works_there(host: ContainerHost, node: Path) -> None:
    """Without a cluster: what follows `exec POD --`, after what a kubelet does with a ConfigMap."""
    play(host, node)
    config = host.volume("interceptd") / "interceptd.toml"
    config.write_text(f"{config.read_text()}limits.operators = 9\n")
    run = [
        shlex.split(each.partition(" -- ")[2])
        for each in guide.commands("Kubernetes")
        if " exec POD -- " in each
    ]
    said = [host.podman("exec", POD, *command) for command in run]
    assert [command[0] for command in run] == ["interceptctl", "interceptd", "sh"]
    assert re.search(r"^limits.operators = 9 +# /etc/interceptd/interceptd.toml$", said[1], re.MULTILINE)
    [reloaded] = wait_logged(host, POD, "configuration_reloaded")
    assert reloaded["changed"] == ["limits.operators: 32 -> 9"]
