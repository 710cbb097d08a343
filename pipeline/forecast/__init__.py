"""What a cache of a dataset would cost and lose, measured before it is built."""
