"""The versions: one folder each, found through ``versions.registry``; none imports another."""
