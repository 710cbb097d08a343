"""Size, time and fidelity of a cache of a dataset, measured before it is built."""
