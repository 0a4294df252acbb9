"""Tables of the papers, and of this bundle's own: their rows trained, evaluated and set beside one another."""
