"""The container file and the Kubernetes manifest: their restrictions, and that what they name exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.eventually import PATIENCE

ROOT = Path(__file__).parents[2]
CONTAINERFILE = (ROOT / "deploy" / "container" / "Containerfile").read_text()
MANIFEST = ROOT / "deploy" / "kubernetes" / "daemonset.yaml"
VALIDATE = shutil.which("kubernetes-validate", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


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


def test_the_containers_first_process_keeps_the_daemon() -> None:
    """With the arguments of both files, which follow the entry point."""
    entry = re.search(r"^ENTRYPOINT (.+)$", CONTAINERFILE, re.MULTILINE)
    assert entry is not None
    assert json.loads(entry[1]) == ["interceptd", "keep", "--", "serve"]
    assert "command:\n" not in MANIFEST.read_text()


def test_everything_that_the_container_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", CONTAINERFILE, re.MULTILINE)
    missing = [path for line in copied for path in line.split() if not (ROOT / path).exists()]
    assert (len(copied), missing) == (5, [])


@pytest.mark.skipif(VALIDATE is None, reason="needs kubernetes-validate, from PyPI")
def test_the_manifest_is_valid_strictly() -> None:
    command = [str(VALIDATE), "--strict", str(MANIFEST)]
    validated = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT, timeout=60, check=False
    )
    assert (validated.returncode, validated.stdout.count(" passed ")) == (0, 3)


@pytest.mark.parametrize("wanted", ["hostPID: true", "privileged: true", "runAsUser: 0", "add:", "runAsRoot"])
def test_the_manifest_requests_no_privilege(wanted: str) -> None:
    assert wanted not in MANIFEST.read_text()


def test_the_manifest_shares_the_vmms_socket_and_not_the_operators() -> None:
    text = MANIFEST.read_text()
    volumes = dict(
        re.findall(
            r"^        - name: (\w+)\n          (\w+):", text.split("\n      volumes:\n")[1], re.MULTILINE
        )
    )
    assert volumes == {"vmm": "hostPath", "operator": "emptyDir", "config": "configMap"}
    assert "--operator-socket=/run/interceptd/operator/" in text
    assert "--socket=/run/interceptd/vmm/" in text


def test_every_probe_of_the_manifest_needs_the_event_loop() -> None:
    """The health command as it starts, then what costs no process: /healthz."""
    text = MANIFEST.read_text()
    probes = re.findall(r"(\w+)Probe:\n +(exec|httpGet):\n +(command: .*|path: .*)\n", text)
    assert probes == [
        ("startup", "exec", "command: [interceptctl, health]"),
        ("readiness", "httpGet", "path: /healthz"),
        ("liveness", "httpGet", "path: /healthz"),
    ]


def test_the_port_of_the_metrics_is_one_everywhere() -> None:
    text = MANIFEST.read_text()
    ports = re.findall(
        r'containerPort: (\d+)|prometheus.io/port: "(\d+)"|metrics.listen = "0.0.0.0:(\d+)"', text
    )
    exposed = re.findall(r"^EXPOSE (\d+)$", CONTAINERFILE, re.MULTILINE)
    assert {"".join(port) for port in ports} == set(exposed) == {"9477"}
    assert len(ports) == 3


def test_the_configuration_in_the_manifest_is_one_that_the_daemon_takes(tmp_path: Path) -> None:
    inlined = re.search(r"interceptd\.toml: \|\n((?:    .*\n)+)", MANIFEST.read_text())
    assert inlined is not None
    file = tmp_path / "interceptd.toml"
    file.write_text("".join(line[4:] for line in inlined[1].splitlines(keepends=True)))
    command = [sys.executable, "-m", "interceptd", "check-config", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "uids 107, 65532" in checked.stdout
    assert "metrics at 0.0.0.0:9477" in checked.stdout
