"""The commands of the command line, each with its arguments and its function."""
