"""Graph passes: what `torch.compile` does to the 1-D convolutions of a graph, and the report of it."""
