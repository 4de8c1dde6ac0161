"""The demonstration: choices, seeds, conditions, and beside the teacher in memory."""
