#!/bin/sh
# Makes the gateway's database roles. PostgreSQL's image runs this once, when it makes its data folder; elsewhere run it
# by hand, as a role that may create roles, with PGHOST and the like set:
#
#   POSTGRES_USER=postgres POSTGRES_DB=farebox GATEWAY_PASSWORD=… sh deploy/postgres-roles.sh
#
# farebox_gateway owns nothing, bypasses no policy and cannot log in: it is what the gateway may do.
# farebox_app logs in, and may do just that. Whoever runs `farebox migrate` is another role, and owns the tables.
set -eu
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\getenv password GATEWAY_PASSWORD
-- Roles belong to all databases of a server: a migration of one of them may have made this one already.
SELECT 'CREATE ROLE farebox_gateway NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS'
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'farebox_gateway') \gexec
CREATE ROLE farebox_app LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS PASSWORD :'password'
    IN ROLE farebox_gateway;
SQL
