"""The faults that bgjob survives, each against a real server and, where it matters, in processes."""
