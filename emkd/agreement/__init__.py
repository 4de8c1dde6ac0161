"""Can this student use this cache? One answer for the teacher's job, for training and for inspection."""
