"""What things cost. Pure: no network, clock, randomness or database."""
