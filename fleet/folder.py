"""The data folder of an embedded fleet: its lock and its secrets.

Invariants:
1. One fleet a folder. The lock is a flock on an open file, so the kernel drops it with the last
   process that holds it; no stale lock file can block a start.
2. Servers inherit the lock's descriptor. After a SIGKILL of the parent the folder stays locked
   until the last server has closed its files, so two servers never write the same log or cluster.
3. A secret is made once, written with mode 0600 before anything uses it, and never stands on a
   command line.

Called by `valkey`, `postgres` and `supervise`.
"""

import fcntl
import os
import secrets
import time
from pathlib import Path

from headrace.fleet.failure import FleetError

#: A server whose parent was killed takes a moment to flush and go; a folder that is still locked
#: after this is in use.
HANDOVER_S = 5.0

POLL_S = 0.02


def lock_folder(folder: Path, wait_s: float | None = None) -> int:
    """Create `folder` if needed and lock it; return the descriptor that holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise FleetError(
            f"the data folder {folder} cannot be used ({error.strerror}):"
            " choose another one with HEADRACE_DATA_DIR"
        ) from error
    deadline = time.monotonic() + (HANDOVER_S if wait_s is None else wait_s)
    while not _try_lock(lock):
        if time.monotonic() > deadline:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise FleetError(
                f"{folder} is in use by another fleet (started by pid {owner}):"
                " stop that one, or choose another folder with HEADRACE_DATA_DIR"
            )
        time.sleep(POLL_S)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def secret(path: Path) -> str:
    """Return the secret kept at `path`; make it on the first call."""
    try:
        kept = path.read_text().strip()
    except FileNotFoundError:
        kept = ""
    if kept:
        return kept
    fresh = secrets.token_urlsafe(24)
    write_private(path, fresh)
    return fresh


def write_private(path: Path, text: str) -> None:
    """Replace `path` by `text`, mode 0600; a reader sees the old text or the new, never a part."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
