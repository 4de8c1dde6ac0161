"""A real language model as a teacher: what real_lm.py is made of."""
