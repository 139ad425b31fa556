"""Pictures of what a tower does with an image, and plots of what training gave."""
