"""The teacher side: from dataset rows to a cache."""
