"""How long refused work waits before it is tried again."""

FIRST = 0.05
"""Seconds before refused work is tried again."""


class Pause:
    """Seconds that double with each refusal."""

    def __init__(self, longest: float, first: float = FIRST) -> None:
        self._longest, self._first = longest, first
        self.seconds = first

    def grow(self) -> None:
        """Double, up to the longest."""
        self.seconds = min(2 * self.seconds, self._longest)

    def reset(self) -> None:
        """Begin again with the first."""
        self.seconds = self._first
