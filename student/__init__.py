"""The student side: cache -> model."""
