"""The commands of the command line, each with its arguments and what it does."""
