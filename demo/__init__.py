"""The built-in example: the published easy-VQA set, a small teacher trained on it, a student to start."""
