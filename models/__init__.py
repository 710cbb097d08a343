"""What teacher and student both know of a transformers vision-language model."""
