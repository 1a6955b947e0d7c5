"""`fleet.json`: where the fleet of a data folder is, and what opens it: a key and an operator.

Written by `supervise` with mode 0600 when the fleet is ready; read by the CLI, so that `headrace
submit` in the same folder needs no options. Holds the passwords of both servers.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.fleet.failure import FleetError
from headrace.fleet.folder import write_private

FILE = "fleet.json"


@dataclass(frozen=True, slots=True)
class Access:
    api_url: str
    api_key: str
    database_url: str
    redis_url: str
    operator: str = ""  # who may log in at the dashboard
    operator_password: str = ""  # as it was made; empty: somebody else made the operators

    @property
    def dashboard_url(self) -> str:
        return f"{self.api_url}/dashboard"


def read_access(data_folder: Path) -> Access | None:
    """Return what the last fleet of the folder wrote; None when there was none."""
    path = data_folder / FILE
    try:
        return Access(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise FleetError(
            f"{path} cannot be read ({error}): remove it, and start the fleet with `headrace up`"
        ) from error


def write_access(data_folder: Path, access: Access) -> None:
    write_private(data_folder / FILE, json.dumps(asdict(access), indent=2) + "\n")
