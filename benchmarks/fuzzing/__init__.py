"""Coverage-guided fuzzing of the readers."""
