"""What a run is: its config.json, what trained it, and what each of its models depends on."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ..base.device import count_cores, find_devices
from ..base.errors import InputError
from ..base.files import sha256, write_atomic
from ..base.parameters import Parameters
from ..base.provenance import provenance, this_machine
from ..fedavg import FedAvg
from ..privacy.client import refuse_beyond_total
from ..rounds import Job

ARM_ONLY = ("data_dir", "arms", "seeds", "lr_centralised", "lr_local")  # never of a single model


def open_run(settings: Parameters, server: str, fingerprint: str) -> dict[str, Any]:
    """Write `config.json` for a new run, or check that the one there is the same; return it.

    `server` is the strategy's `name_class`. Raises InputError on what differs.
    """
    config = check_run(settings, server=server, fingerprint=fingerprint)
    starts = _read_config(settings.run).get("starts", [])
    (settings.run / "models").mkdir(parents=True, exist_ok=True)
    content = json.dumps(config | {"starts": starts}, indent=1)
    write_atomic(settings.run / "config.json", content.encode())
    return config


def check_run(settings: Parameters, **known: str) -> dict[str, Any]:
    """Return what `config.json` holds of a run with these settings, and what else is `known`.

    Threads a replica belong to a run: where the settings leave them open, a run that goes on keeps
    those it began with. Raises InputError where a run of that name is another one.
    """
    old = _read_config(settings.run)
    devices = find_devices(settings.device)
    # A replica a core, on which bits do not depend; a GPU's own thread has time to spare.
    share = 1 if devices[0].type == "cpu" else max(1, count_cores() // len(devices))
    config = settings.identity() | known
    config |= provenance(settings.device, settings.precision, settings.weights)
    config["threads"] = settings.threads or old.get("threads") or share
    for key in [key for key in config if old and old.get(key) != config[key]]:
        raise InputError(
            f"{settings.run} is a run with {key}={old.get(key)!r}, not {config[key]!r}: choose"
            " another name, or delete that folder"
        )
    return config


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def name_class(strategy: type[FedAvg]) -> str:
    """Name a strategy's class; one of the user's own with a hash of the code that it may use.

    That is the whole file of each class it derives from. Of a class that was typed in a notebook it
    is the code of its functions, with the plain values that they name.
    """
    ours = f"{__package__.partition('.')[0]}."
    own = [k for k in strategy.__mro__ if not k.__module__.startswith(ours) and k is not object]
    if not own:
        return strategy.__name__
    return f"{strategy.__name__} {sha256(repr([_code_of(kind) for kind in own]).encode())[:16]}"


def _code_of(kind: type) -> object:
    """Return the text of the file that defines a class, else what its functions are made of."""
    file = Path(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")
    if file.suffix == ".py" and file.is_file():
        return file.read_text()
    own = sorted(vars(kind).items())
    own = [(k, v) for k, v in own if isinstance(v, FunctionType) or not k.startswith("__")]
    return [(name, _describe(value)) for name, value in own]


def _describe(value: object, seen: frozenset[int] = frozenset()) -> object:
    """Describe a function by its code and what that names, a plain value by itself, else a type."""
    value = getattr(value, "__func__", value)
    if isinstance(value, FunctionType) and id(value) not in seen:
        codes = [value.__code__]
        for code in codes:  # with those of its inner functions, which come behind
            codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        named = [value.__globals__.get(name) for code in codes for name in code.co_names]
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        held += [part for code in codes for part in code.co_consts]
        about = [*named, *held, *(value.__defaults__ or ())]
        texts = [(code.co_code.hex(), code.co_names) for code in codes]
        return texts, [_describe(part, seen | {id(value)}) for part in about]
    plain = isinstance(value, str | int | float | bool | bytes | tuple | frozenset | None)
    return repr(value) if plain else type(value).__name__


def note_start(run: Path, *starts: dict[str, Any]) -> None:
    """Add to `config.json` when, on which machine and with which code a run trained.

    Without any `starts` that is now and here; others are those of a model from another run.
    """
    path, config = run / "config.json", _read_config(run)
    new = starts or (this_machine(),)
    config["starts"] += [start for start in new if start not in config["starts"]]
    write_atomic(path, json.dumps(config, indent=1).encode())


def note_adopted(run: Path, other: Path) -> None:
    """Add to `config.json` what trained another run, of which a model is adopted."""
    starts = _read_config(other).get("starts", [])
    note_start(run, *({"run": other.name} | start for start in starts))


def model_identity(job: Job, config: dict[str, Any]) -> str:
    """Return a hash of all that a job's model depends on, and of nothing else."""
    own = {k: v for k, v in job.settings.identity().items() if k not in ARM_ONLY}
    of_run = {k: v for k, v in config.items() if k not in vars(job.settings)}
    own |= of_run | {"trunk": job.settings.seed_list[0], "threads": config["threads"]}
    own |= {} if job.arm == "federated" else {"server": FedAvg.__name__}
    return sha256(json.dumps(own, sort_keys=True).encode())


def name_release(job: Job, config: dict[str, Any]) -> str:
    """Name a job's model in the ledger: by its name, and by all that it depends on."""
    return f"{job.name} {model_identity(job, config)[:16]}"


def keep_ledgers(jobs: Sequence[Job], config: dict[str, Any]) -> None:
    """Let all clients write what they release; InputError where it would exceed a total."""
    for job in jobs:
        for client in job.clients:
            client.keep_ledger(Path(job.settings.work_dir), name_release(job, config))
    refuse_beyond_total(client for job in jobs for client in job.clients)
