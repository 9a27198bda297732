"""Money in: checkout, what the payment processor tells, refunds and disputes, automatic top-ups, the books."""
