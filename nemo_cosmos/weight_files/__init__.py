"""Files of weights of any model, read and written one tensor at a time."""
