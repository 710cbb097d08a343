"""Reading datasets: files of rows, conversations and images."""
