"""What several benchmarks share. Importing it loads neither torch nor transformers."""
