"""How the metrics of several processes come together: each writes into a folder, and whichever is asked adds up.

Nothing of Prometheus's client may be imported before the variable is set, so this module imports nothing.
"""

from typing import Final

MULTIPROCESS_DIR: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that names the folder."""
