"""Who is calling: tenants, apps, keys and customers."""
