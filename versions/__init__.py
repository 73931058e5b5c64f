"""The versions, one folder each. ``versions.registry`` lists them; no version imports another."""
