"""The networks: the figures of the papers, one module a part."""
