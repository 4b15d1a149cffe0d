"""What a worker decides."""
