"""Work on whole checkpoints: plan, carry out, resume, complete."""
