"""Start, stop and use a Flower network by its commands alone, quiet and offline."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..base.device import find_devices
from ..base.errors import InputError, NotebookFailed
from ..base.files import PACKAGE, write_atomic
from ..base.parameters import check_names, check_value, convert
from ..privacy.keys import PUBLIC
from ..settings import FIELDS

SUPPORTED = "1.42"  # Flower's commands and interfaces move with each minor version
COMMANDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
# The parameters that a hospital sets for itself: from the third on what it insists on.
HOSPITALS = ("device", "weights", "min_clients", "secure_aggregation", "least_count", "dp",
             "total_epsilon")  # fmt: skip
STARTED = re.compile(r"started run (\d+)")


def check_flower() -> None:
    """Raise InputError unless the supported version of Flower is installed."""
    wanted = f"pip install 'flwr=={SUPPORTED}.*'"
    try:
        found = version("flwr")
    except PackageNotFoundError as error:
        raise InputError(f"Flower is not installed, the extra `flower`: {wanted}") from error
    if not found.startswith(f"{SUPPORTED}."):
        raise InputError(f"flwr {found} is installed, {SUPPORTED} is supported: {wanted}")


def command(name: str, /, **values: object) -> list[str]:
    """Return a command of commands.toml, or a part of one, with these values filled in."""
    return [part.format(**values) for part in shlex.split(COMMANDS[name])]


def superlink(host: str, port: int, folder: Path, keys: Path | None) -> list[str]:
    """Return the command of the server's SuperLink; without keys anyone may connect, unencrypted.

    With `keys` it speaks TLS and knows registered nodes only, which it remembers in `folder`.
    """
    call = command("superlink", host=host, port=port, folder=folder)
    return call + (command("superlink_with_keys", keys=keys) if keys else ["--insecure"])


def supernode(
    name: str, work: Path, server: str, port: int, keys: Path | None, own: Mapping[str, str]
) -> list[str]:
    """Return the command of a hospital's SuperNode, which only calls out, to `server` (HOST:PORT).

    `port` stays on 127.0.0.1; `keys` holds the server's certificate and this hospital's key; `own`
    are its own parameters: `device`, and `weights`, its copy of the file that a run starts from.
    """
    about = {"name": name, "work_dir": str(work.resolve())} | dict(own)
    if "weights" in own:
        about["weights"] = str(Path(own["weights"]).expanduser().resolve())
    if keys:
        about["keys"] = str(keys.resolve())
    config = " ".join(f'{key}="{value}"' for key, value in about.items())
    call = command("supernode", server=server, port=port, config=config)
    return call + (command("supernode_with_keys", keys=keys, name=name) if keys else ["--insecure"])


def free_port() -> int:
    """Return a port that nobody uses on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flower_environment(home: Path, server: str, keys: Path | None) -> dict[str, str]:
    """Return the environment of all Flower commands, and tell `flwr` where the SuperLink is."""
    how = f'root-certificates = "{keys.resolve() / "server.crt"}"' if keys else "insecure = true"
    config = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{server}"\n{how}\n'
    home.mkdir(parents=True, exist_ok=True)
    write_atomic(home / "config.toml", config.encode())
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | COMMANDS["quiet"] | {"FLWR_HOME": str(home.resolve()), "PATH": path}


def register(public_key: Path, environment: Mapping[str, str]) -> None:
    """Let the hospital with this public key connect; raise NotebookFailed if it cannot be told."""
    call = command("register", public_key=public_key)
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    if done.returncode or "registered" not in done.stdout:
        raise NotebookFailed(f"{public_key} was not registered: {done.stdout} {done.stderr}")


def run_server_app(
    values: Mapping[str, Any],
    environment: Mapping[str, str],
    seconds: float = 7 * 24 * 3600,
    wait: float = 600,
    keys: Path | None = None,
    survey: bool = False,
) -> dict[str, Any]:
    """Run the ServerApp with these parameters, show its log, and return what Flower says of it.

    It trains, or is a `survey` of the hospitals' films.

    Raises NotebookFailed if its own status is not `finished:completed` within `seconds`.
    """
    text = " ".join(f"{key}={json.dumps(str(value))}" for key, value in values.items())
    folder = keys.resolve() if keys else ""
    config = f"parameters='{text}' wait-seconds={float(wait)} keys='{folder}'"
    config += f" survey={str(survey).lower()}"
    call = command("run", project=PACKAGE.parent, config=config)
    output = show(call, environment, seconds)
    found = STARTED.search(output)
    if not found:
        raise NotebookFailed(f"Flower did not start the run: {output[-1000:]}")
    call = command("list", run=found[1])
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    listed = json.loads(done.stdout or "{}")
    if not listed.get("runs"):  # even then `flwr list` may end with status 0
        raise NotebookFailed(f"run {found[1]}: its status is unknown: {done.stdout}{done.stderr}")
    run = listed["runs"][0]
    if run["status"] != "finished:completed":
        raise NotebookFailed(f"run {found[1]} {run['status']}: {run['status-details']}")
    return run


def show(call: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    """Run a command for at most so many seconds; print what it says, and return it."""
    lines, pipes = [], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(call, env=environment, **pipes) as process:
        clock = threading.Timer(seconds, process.kill)
        clock.start()
        try:
            for line in process.stdout:
                lines.append(line)
                print(f"    {line}", end="", flush=True)
        finally:
            clock.cancel()
            process.kill()
    return "".join(lines)


def make_certificate(keys: Path, host: str) -> None:
    """Write `server.key` and `server.crt`, for a year; hospitals reach the server as `host`."""
    kind = "IP" if re.fullmatch(r"[\d.]+|.*:.*", host) else "DNS"
    make_file(keys / "server.key", command("certificate", keys=keys, host=host, kind=kind))


def make_key(keys: Path, name: str) -> None:
    """Write a hospital's `NAME.key`, which stays there, and `NAME.key.pub` for the server."""
    path = keys / f"{name}.key"
    make_file(path, command("key", path=path))


def make_file(path: Path, command: Sequence[str]) -> None:
    """Run the command that writes a secret; raise InputError if it is there or cannot be made."""
    if path.exists():
        raise InputError(f"{path} is there already: delete it to have a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(f"{command[0]} is not installed, and {path.name} needs it") from error
    except subprocess.CalledProcessError as error:
        raise InputError(f"{path}: {error.stderr}") from error
    path.chmod(0o600)


def check_public(keys: Path | None) -> None:
    """Raise InputError for a folder of keys without a public one, by which to know a hospital."""
    if keys and not [*keys.glob(f"*{PUBLIC}")]:
        raise InputError(f"--keys {keys}: it has no NAME{PUBLIC}, by which to know a hospital")


def read_demands(values: Mapping[str, Any], keys: Path | None) -> dict[str, str]:
    """Return the parameters that a hospital sets itself, as text; InputError for what none can."""
    given = {key: value for key, value in values.items() if key != "work_dir"}
    check_names(given, FIELDS)
    for other in given.keys() - HOSPITALS:
        raise InputError(f"-p {other}: a hospital sets {', '.join(HOSPITALS)} alone")
    own = {key: convert(FIELDS[key], value) for key, value in given.items()}
    for key, value in own.items():
        check_value(FIELDS[key], value)
    find_devices(own.get("device", "auto"))
    if own.get("secure_aggregation"):
        if not keys:
            raise InputError("-p secure_aggregation=true wants --keys DIR with all *.key.pub")
        check_public(keys)
    if "weights" in own and not Path(own["weights"]).expanduser().is_file():
        raise InputError(f"-p weights={own['weights']}: no such file; give the hospital's copy")
    return {key: str(value) for key, value in own.items()}


def take_step(
    step: str, name: str, server: str, keys: Path | None, values: Mapping[str, Any]
) -> Any:
    """Do one step of `python -m fedutils flower`; SuperLink and SuperNode run until stopped."""
    check_flower()
    host, _, port = server.rpartition(":")
    if not (host and port.isdigit()):
        raise InputError(f"--server {server}: expected HOST:PORT, such as fed.example.org:8000")
    work = Path(values["work_dir"])
    if step == "certificate":
        return make_certificate(keys or Path("keys"), name)
    if step == "key":
        return make_key(keys or Path("keys"), name)
    environment = flower_environment(work / "flower", server, keys)
    if step == "register":
        return register(Path(name), environment)
    if step in ("train", "survey"):
        from .server import read_network

        read_network(values)  # what is wrong is said here, before anything starts
        check_public(keys)
        return run_server_app(values, environment, keys=keys, survey=step == "survey")
    call = superlink(host, int(port), work / "flower", keys)
    if step == "hospital":
        own = read_demands(values, keys)
        call = supernode(name, work, server, free_port(), keys, own)
    os.execvpe(call[0], call, environment)
