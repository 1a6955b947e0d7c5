"""What a container would forbid a process, by Landlock: writing anywhere but where it is allowed.

Landlock (Linux 5.13, needs no root) refuses with EACCES what a read-only root filesystem refuses
with EROFS, to the process and to all it starts; root is refused too. `no_new_privs` comes with it.

Called by: local_services.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all machines
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38

WRITE_FILE = 1 << 1
#: Removing and making of every kind of file.
CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))
#: Bit -> the version that knows it: moving between folders, truncating.
LATER = {13: 2, 14: 3}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    done = _libc.syscall(number, *arguments)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock is needed for this test: {os.strerror(code)}")
    return done


def _words(*values: tuple[int, int]) -> ctypes.Array[ctypes.c_char]:
    """Pack (value, bytes) pairs without padding, as the kernel's structs are."""
    return ctypes.create_string_buffer(b"".join(v.to_bytes(n, "little") for v, n in values))


@contextmanager
def confined_to(folders: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Yield what a child calls before exec: from then on it can write in `folders` and /dev only.

    /dev holds `null` and `shm`, which a container has, as tmpfs, whatever its root filesystem is.
    """
    version = _call(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)
    handled = WRITE_FILE | CHANGE_FOLDER
    handled |= sum(1 << bit for bit, since in LATER.items() if version >= since)
    ruleset = _call(CREATE_RULESET, _words((handled, 8)), ctypes.c_size_t(8), 0)
    try:
        for folder in [*folders, Path("/dev")]:
            handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            rule = _words((handled, 8), (handle, 4))
            _call(ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0)
            os.close(handle)

        def confine() -> None:
            _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            if _libc.syscall(RESTRICT_SELF, ruleset, 0) != 0:
                os._exit(126)

        yield confine
    finally:
        os.close(ruleset)
