"""Who is there: hospitals that join a run over a network or leave it are lines in its history.

A run is of the hospitals of its start: shares of all films and masks are. Who left may come back.
"""

from collections.abc import Collection

from ..client import Update
from ..rounds import Job, Progress, Row, client_row

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
