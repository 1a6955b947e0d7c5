"""The database's schema: Alembic's `upgrade head`, through its API.

Called by the CLI (`headrace migrate`, which `up` runs as a process) and the test fixtures.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy.exc import OperationalError

from headrace.contract.database import connect
from headrace.fleet.failure import FleetError

#: Beside this folder in the repository as in an installed package.
SCRIPTS = Path(__file__).resolve().parent.parent / "migrations"


def migrate(database_url: str) -> str:
    """Bring the database to the newest schema; return its revision."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["url"] = database_url
    engine = connect(database_url, pool_size=1)
    try:
        command.upgrade(config, "head")
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() or ""
    except OperationalError as error:
        raise FleetError(
            f"the migration could not reach {engine.url!r} ({error.orig}):"
            " check HEADRACE_DATABASE_URL"
        ) from error
    finally:
        engine.dispose()
