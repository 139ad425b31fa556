"""Measurements: time, memory."""
