"""What answers cost: an API under load, and first token and tokens a second of assistants side by side."""
