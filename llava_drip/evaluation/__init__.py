"""Benchmarks of the assistant: their prompts, files of answers, scores, judging, and the record beside every score."""
