"""The error that the benchmark raises for what it was asked for but cannot do."""


class BenchError(ValueError):
    """A malformed case, an unknown name, a missing library or GPU; the message is for the person who asked."""
