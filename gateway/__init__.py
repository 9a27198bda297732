"""Everything that talks: HTTP, upstreams, browsers, agents."""
