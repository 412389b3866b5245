"""Who is there, and how far: hospitals that join a run or leave it are lines in its history.

A run is of the hospitals of its start: shares of all films and masks are. Who left may come back.
"""

from collections.abc import Collection, Mapping

import pandas as pd

from ..client import Update
from ..rounds import FederationError, Job, Progress, Row, client_row

JOINED, LEFT, STRANGE = "joined", "left", "left out"
REASONS = {JOINED: "connected again", LEFT: "not connected", STRANGE: "new: wait for the next run"}


def note_changes(job: Job, now: Progress, there: Collection[str]) -> list[Row]:
    """Return a row for each change of who is there before a round, and print it."""
    rows, members = [], {client.name for client in job.clients}
    last = {row["client"]: row["status"] for row in now.rows if row["status"] in REASONS}
    for name in sorted(members | {*there}):
        status = (JOINED if name in there else LEFT) if name in members else STRANGE
        if status != last.get(name, JOINED):
            update = Update(name, 0, status=status, reason=REASONS[status])
            rows.append(client_row(job, now.round + 1, update, {}))
            print(f"{job.name}, round {now.round + 1}: {name} {status}: {REASONS[status]}")
    return rows


def check_validated(job: Job, now: Progress, count: int, faults: Mapping[str, object]) -> None:
    """Raise FederationError where fewer than `min_clients` of several have validated."""
    if count < min(job.settings.min_clients, len(job.clients)) > 1:
        about = {"round": now.round, "status": "failed"}
        rows = [about | {"client": name, "reason": fault} for name, fault in faults.items()]
        raise FederationError(job, rows, "too few hospitals validated")


def print_round(row: Row, history: pd.DataFrame) -> None:
    """Print a line about a round."""
    print(f"round {row['round']}: train loss {row['train_loss']:.4f}, validation loss "
          f"{row['val_loss']:.4f}, AUROC {row['val_auroc']:.3f}, {row['seconds']:.0f} s, "
          f"state {row['state_sha256']}", flush=True)  # fmt: skip
