"""What is kept: one schema a kind of file, reading and writing, statistics, comparison."""
