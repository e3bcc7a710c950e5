"""What an MLP is, and what it becomes when it is compressed."""
