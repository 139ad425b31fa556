"""Many requests at once on one model: a queue, a running batch that requests join and leave, caches."""
