"""What can be done with finished caches: verify, summarise, compare, select, merge, export."""
