"""What a handler's answer means."""
