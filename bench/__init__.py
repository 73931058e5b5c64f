"""convbench: commands, measuring, records and views; README.md has the map of the rooms."""

__version__ = "0.2.0"
