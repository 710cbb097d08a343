"""The paper's ablations on two small sets: `python -m ablations`."""
