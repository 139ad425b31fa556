"""What this machine has of what the package needs, and whether it works: scripts/doctor.py.

Nothing here imports the rest of the package, nor what it depends on, but in processes of their own: those may be what is missing.
"""
