"""The journey of one metered request."""
