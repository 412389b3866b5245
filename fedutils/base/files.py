"""Files: written whole or not at all, found, hashed, and kept by one writer."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from .errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# The variable lets a test have a Kaggle of its own, in the kernels of its notebooks too.
KAGGLE = Path(os.environ.get("FEDUTILS_KAGGLE") or "/kaggle")
ROOT_MARKER = "notebooks/01_explore.py"
PACKAGE = Path(__file__).resolve().parents[1]
FULL = errno.ENOSPC, errno.EDQUOT
LOCK = "run.lock", "run.pid"  # of a folder that is being written


def package_files() -> list[Path]:
    """Return the code of this package, and the tables and templates beside it, in order."""
    kinds = (".py", ".toml", ".j2", ".mplstyle")
    return sorted(path for path in PACKAGE.rglob("*.*") if path.suffix in kinds)


def find_root() -> Path:
    """Return the project's folder, from wherever a notebook runs; on Kaggle the output folder."""
    if (KAGGLE / "working").is_dir():
        return KAGGLE / "working"
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / ROOT_MARKER).is_file()), here)


def find_work(work_dir: str) -> Path:
    """Return the work folder as an absolute path; empty means work/ of the project."""
    return Path(work_dir).expanduser().resolve() if work_dir else find_root() / "work"


@contextlib.contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn the error of a full disk while `path` is written into an InputError that says where."""
    try:
        yield
    except Exception as error:  # safetensors has an error of its own, with the system's words
        if getattr(error, "errno", 0) not in FULL and "No space left on device" not in str(error):
            raise
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(there).free / 1e6
        what = f"{path}: the disk is full ({free:,.0f} MB are free)"
        raise InputError(f"{what}; make room, and repeat the command: it goes on") from error


def write_atomic(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all; `content` may be a function that writes to a path."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_full_named(path):
        drop_halves(path)
        try:
            beside.write_bytes(content) if isinstance(content, bytes) else content(beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def drop_halves(path: Path) -> None:
    """Drop what processes that were killed left beside a file that they wrote."""
    if os.name != "posix":  # elsewhere one cannot ask whether a process lives
        return
    for half in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.tmp"):
        try:
            os.kill(int(half.name.split(".")[-2]), 0)
        except ProcessLookupError:
            half.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue  # it lives, and is another user's; or the file is not one of ours


def write_private(path: Path, text: str | bytes) -> None:
    """Write a file as `write_atomic` does, for nobody else to read; its folder is made."""

    def write(beside: Path) -> None:
        """Write what nobody else may read."""
        beside.touch(0o600)
        beside.write_bytes(text if isinstance(text, bytes) else text.encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def search_files(root: Path, pattern: str, depth: int = 6) -> Iterator[Path]:
    """Yield the files of a pattern below `root`, the nearest first, without any image folder."""
    level = [root]
    for _ in range(depth + 1):
        for folder in level:
            yield from sorted(folder.glob(pattern))
        inner = [path for folder in level for path in sorted(folder.glob("*/"))]
        # Image folders hold thousands of films.
        level = [path for path in inner if not path.name.startswith(("images", "."))]


def git_revision() -> str:
    """Return the revision of the code, with a plus where files differ; empty outside git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # an installed package or a Kaggle data set has no history
    return done.stdout.strip()


@contextlib.contextmanager
def run_lock(run: Path, wait: bool = False) -> Iterator[None]:
    """Hold `run.lock`, so that a folder has one writer.

    Where another lives, `wait` for it or raise InputError. The system drops the lock with the
    process that held it; `run.pid` is for the reader.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(run / LOCK[0]), run / LOCK[1]
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = f"process {owner.read_text()}" if owner.is_file() else "another process"
        if not wait:
            raise InputError(f"{run}: {who} is writing this run; wait or stop it") from error
        print(f"{run}: waiting for {who}, which is writing there", flush=True)
        lock.acquire()
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def fetch_runs(work_dir: str | Path) -> None:
    """Copy the runs that are attached on Kaggle to the work folder, where it does not have them.

    Attached, they can only be read; copied, 03 goes on with them and 04 writes beside them. The
    ledger of what was released comes along, the latest if there are several.
    """
    ledgers = search_files(KAGGLE / "input", "privacy/ledger.json")
    for ledger in sorted(ledgers, key=lambda path: path.stat().st_mtime)[-1:]:
        if not Path(work_dir, "privacy", ledger.name).is_file():
            copy = {"copy_function": shutil.copyfile, "dirs_exist_ok": True}
            shutil.copytree(ledger.parent, Path(work_dir, "privacy"), **copy)
    found = search_files(KAGGLE / "input", "runs/*/config.json")
    latest_last = sorted(found, key=lambda path: path.stat().st_mtime)
    for name, run in {path.parent.name: path.parent for path in latest_last}.items():
        if not Path(work_dir, "runs", name, "config.json").is_file():
            _copy_run(run, Path(work_dir))


def _copy_run(source: Path, work: Path) -> None:
    """Copy a run folder, but for its lock, under `work`; a kill leaves no half of it there."""
    half, whole = work / f"fetching-{source.name}", work / "runs" / source.name
    shutil.rmtree(half, ignore_errors=True)
    for file in (path for path in source.rglob("*") if path.is_file() and path.name not in LOCK):
        target = half / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)  # without its mode: what is attached may not be written to
        os.utime(target, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    shutil.rmtree(whole, ignore_errors=True)  # without config.json nothing was trained there
    whole.parent.mkdir(exist_ok=True)
    half.rename(whole)


def open_store(path: Path, last: int = -1) -> "np.ndarray":
    """Open films, uint8 (N, H, W), without reading them.

    Raises InputError where the file is cut short or has no row `last`, which an index names.
    """
    import numpy as np

    try:
        store = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: {error}; run notebook 02_preprocess again") from error
    if len(store) <= last:
        found = f"holds {len(store)} films, but index.csv names row {last}"
        raise InputError(f"{path}: {found}; run notebook 02_preprocess again")
    return store


def read_written(path: Path, *texts: str) -> "pd.DataFrame":
    """Read a table that we wrote: only an empty cell is missing, and these columns are text.

    Else a patient, a hospital or a view called NA, None or null would be lost.
    """
    import pandas as pd  # takes half a second, which not every command needs

    dtypes = dict.fromkeys(texts, str)
    table = pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values=[""])
    return table.fillna({name: "" for name in texts if name in table})
