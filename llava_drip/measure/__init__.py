"""Measurements: FLOPs, time, memory."""
