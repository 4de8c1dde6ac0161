"""Scripts of the maintainers: `measure` (the code in figures) and `draw_rooms` (the picture of the rooms)."""
