"""Pictures of what a tower does with an image."""
