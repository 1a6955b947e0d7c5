"""Alembic's entry: runs the migrations on the connection or URL it is given.

`headrace migrate` passes the URL in `config.attributes["url"]`; the plain `alembic` command takes
`-x url=...`. A session lock lets only one of several starting processes migrate; the others wait
and find nothing to do.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import NullPool, create_engine, text

from headrace.contract.errors import ConfigurationError
from headrace.contract.records import metadata

#: Any constant; all migrating processes of a database must use the same.
LOCK_KEY = 0x68656164

url = context.config.attributes.get("url") or context.get_x_argument(as_dictionary=True).get("url")
if not url:
    raise ConfigurationError("no database was named: use `headrace migrate`, or `-x url=...`")

# No pool: the lock belongs to the session, so the connection must be closed at the end, not kept.
with create_engine(url, poolclass=NullPool).connect() as connection:
    connection.execute(text("select pg_advisory_lock(:key)"), {"key": LOCK_KEY})
    connection.commit()
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
