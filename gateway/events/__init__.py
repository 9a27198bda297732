"""What has happened, told outside: the ledger's outbox, and the webhooks that carry it."""
