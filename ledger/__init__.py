"""Where the credits are: a pure core inside a durable shell."""
