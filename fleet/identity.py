"""As whom Postgres runs: it refuses to be root, and initdb refuses a user without a passwd entry.

| we are | user namespaces | Postgres runs as |
|---|---|---|
| a user of the machine | - | ourselves |
| a user id without passwd entry | allowed | ourselves, seen by it as `nobody` (a user namespace) |
| a user id without passwd entry | refused (Docker's default) | not at all: FleetError |
| root | allowed | root outside, seen by it as `nobody` |
| root | refused (Docker's default) | `nobody`, keeping of root's rights only CAP_DAC_OVERRIDE |
| root, cluster owned by a user | - | that user, in the same way |

No user is made and no folder's mode is changed: a virtual environment under a 0700 home stays
closed to everybody else.

Invariants:
1. `Identity.enter` runs in the child between fork and exec; what can fail is tried first, in a
   process of its own, so that the failure has a name.
2. The files of a cluster have one owner, `Identity.owner_uid`, from the first byte.

Called by `postgres`.
"""

import ctypes
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.fleet.failure import FleetError

CLONE_NEWUSER = 0x10000000
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
#: linux/capability.h: 64-bit sets, passed as two 32-bit words.
CAPABILITY_VERSION_3 = 0x20080522


@dataclass(frozen=True, slots=True)
class Identity:
    owner_uid: int  # owner of the cluster's files, as seen outside
    owner_gid: int
    enter: Callable[[], None] | None  # None: nothing to do


def choose_identity(cluster: Path, program: Path) -> Identity:
    """Choose as whom to run `program` (postgres) on `cluster`, which may not exist yet."""
    uid = os.geteuid()
    if uid != 0 and _has_name(uid):
        return Identity(uid, os.getegid(), None)
    if uid == 0 and cluster.exists() and (kept := cluster.stat()).st_uid != 0:
        return Identity(kept.st_uid, kept.st_gid, _become(kept.st_uid, kept.st_gid))
    nobody = _nobody()
    if sys.platform == "linux" and _works(enter := _enter_namespace(nobody), program):
        return Identity(uid, os.getegid(), enter)
    if uid == 0 and _works(enter := _become(nobody.pw_uid, nobody.pw_gid), program):
        return Identity(nobody.pw_uid, nobody.pw_gid, enter)
    raise FleetError(
        f"the embedded Postgres cannot run for user id {uid}: it refuses root, initdb refuses an id"
        " without a passwd entry, and this machine permits neither a user namespace nor a change of"
        f" user to run {program} in: set HEADRACE_DATABASE_URL to a server of your own, or run as a"
        " named user"
    )


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _nobody() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise FleetError(
            "the embedded Postgres refuses to run as root or as an unnamed user, and there is no"
            " user nobody here: run as a named user, or set HEADRACE_DATABASE_URL to a server of"
            " your own"
        ) from None


def _works(enter: Callable[[], None], program: Path) -> bool:
    try:
        tried = subprocess.run([program, "--version"], capture_output=True, preexec_fn=enter)
    except (subprocess.SubprocessError, OSError):
        return False
    return tried.returncode == 0


def _enter_namespace(inside: pwd.struct_passwd) -> Callable[[], None]:
    """Become `inside` within a new user namespace; outside, the files stay ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid_map = f"{inside.pw_uid} {os.geteuid()} 1".encode()
    gid_map = f"{inside.pw_gid} {os.getegid()} 1".encode()

    def enter() -> None:
        if libc.unshare(CLONE_NEWUSER) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        # setgroups first: the kernel takes a gid map from an ordinary user only after it.
        for name, text in (("setgroups", b"deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
            handle = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(handle, text)
            os.close(handle)

    return enter


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapWord(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _become(uid: int, gid: int) -> Callable[[], None]:
    """Give up root for `uid`, but CAP_DAC_OVERRIDE: it reaches what lies under a 0700 home."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = _CapHeader(CAPABILITY_VERSION_3, 0)
    bit = 1 << CAP_DAC_OVERRIDE
    words = (_CapWord * 2)(_CapWord(bit, bit, bit), _CapWord(0, 0, 0))

    def checked(result: int, what: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), what)

    def enter() -> None:
        linux = sys.platform == "linux"
        if linux:
            checked(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities")
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        if linux:
            checked(libc.capset(ctypes.byref(header), ctypes.byref(words)), "capset")
            # Ambient, or exec would drop it; equal to the permitted set, or exec would clear
            # PDEATHSIG.
            ambient = libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0)
            checked(ambient, "raise ambient capability")

    return enter
