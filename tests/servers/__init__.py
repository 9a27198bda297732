"""Real PostgreSQL and Valkey servers from wheels: nothing is installed, nothing listens but on loopback."""
