"""Management endpoints, one file per resource."""
