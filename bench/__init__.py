"""Measuring: the command line, the runner and its workers, the records they write and the charts drawn from those."""
