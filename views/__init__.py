"""What a person looks at: terminal, pages and pictures made of caches and runs."""
