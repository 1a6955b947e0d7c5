-- Who may do what in the database, run once by Postgres' image when the volume is empty.
--
-- headrace_owner  owns database and schema, changes them: only `headrace migrate` is it.
-- headrace_app    reads and writes rows of what the owner made, and can make nothing: gateway,
--                 workers, tasks.
-- postgres        the superuser: nobody logs in as it but the administrator, from inside.
\set owner_password `cat /run/secrets/database_owner_password`
\set app_password `cat /run/secrets/database_password`

CREATE ROLE headrace_owner LOGIN PASSWORD :'owner_password';
CREATE ROLE headrace_app LOGIN PASSWORD :'app_password';

SELECT current_database() AS database \gset
ALTER DATABASE :"database" OWNER TO headrace_owner;
REVOKE ALL ON DATABASE :"database" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"database" TO headrace_app;

ALTER SCHEMA public OWNER TO headrace_owner;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO headrace_app;
ALTER DEFAULT PRIVILEGES FOR ROLE headrace_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO headrace_app;
ALTER DEFAULT PRIVILEGES FOR ROLE headrace_owner IN SCHEMA public
    GRANT USAGE, SELECT ON SEQUENCES TO headrace_app;
