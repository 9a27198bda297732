"""Where the journal is kept: the tables, and one file per database."""
