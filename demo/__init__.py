"""The built-in example: the published easy-VQA set, a small teacher trained on it, and an initial student."""
