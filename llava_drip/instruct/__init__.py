"""Instruction data and the two stages of LLaVA's training."""
