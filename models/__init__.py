"""What teacher and student share about a transformers vision-language model."""
