"""Output for people: terminal, pages and plots made of caches and runs."""
