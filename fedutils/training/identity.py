"""What a run is: its config.json, what trained it, and what each of its models depends on."""

import contextlib
import inspect
import json
import os
from typing import Any

from ..base.device import find_devices
from ..base.errors import InputError
from ..base.files import sha256, write_atomic
from ..base.parameters import Parameters
from ..base.provenance import provenance, this_machine
from ..fedavg import FedAvg
from ..rounds import Job

ARM_ONLY = ("data_dir", "arms", "seeds", "lr_centralised", "lr_local")  # never of a single model


def open_run(settings: Parameters, server: str, fingerprint: str) -> dict[str, Any]:
    """Write `config.json` for a new run, or check that the one there is the same; return it.

    Threads a replica belong to a run: where the settings leave them open, a run that goes on keeps
    those it began with. `server` is the strategy's `name_class`. Raises InputError on what differs.
    """
    path = settings.run / "config.json"
    old = json.loads(path.read_text()) if path.is_file() else {}
    share = max(1, (os.cpu_count() or 1) // len(find_devices(settings.device)))
    beside = provenance(settings.device, settings.precision, settings.weights)
    config = settings.identity() | beside | {
        "threads": settings.threads or old.get("threads") or share,
        "server": server,
        "fingerprint": fingerprint,
    }  # fmt: skip
    for key in [key for key in config if old and old.get(key) != config[key]]:
        raise InputError(
            f"{settings.run} is a run with {key}={old.get(key)!r}, not {config[key]!r}: choose"
            " another name, or delete that folder"
        )
    (settings.run / "models").mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(config | {"starts": old.get("starts", [])}, indent=1).encode())
    return config


def name_class(strategy: type[FedAvg]) -> str:
    """Name a strategy's class; one of the user's own with a hash of its code, if that is known."""
    name = strategy.__name__
    if strategy.__module__.startswith(f"{__package__.partition('.')[0]}."):
        return name
    with contextlib.suppress(OSError, TypeError):  # typed at a prompt, it has no source
        return f"{name} {sha256(inspect.getsource(strategy).encode())[:16]}"
    return name


def note_start(settings: Parameters) -> None:
    """Add to `config.json` that training starts now, on this machine and with this code."""
    path = settings.run / "config.json"
    config = json.loads(path.read_text())
    config["starts"].append(this_machine())
    write_atomic(path, json.dumps(config, indent=1).encode())


def model_identity(job: Job, config: dict[str, Any]) -> str:
    """Return a hash of all that a job's model depends on, and of nothing else."""
    own = {k: v for k, v in job.settings.identity().items() if k not in ARM_ONLY}
    of_run = {k: v for k, v in config.items() if k not in vars(job.settings)}
    own |= of_run | {"trunk": job.settings.seed_list[0]}
    own |= {} if job.arm == "federated" else {"server": FedAvg.__name__}
    return sha256(json.dumps(own, sort_keys=True).encode())
