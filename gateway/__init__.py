"""Everything that talks: HTTP, upstreams, browsers, agents."""

from typing import Final

__version__: Final = "0.1.0"
