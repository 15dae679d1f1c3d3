"""One HTML page of a run directory, all in one file: facts, curves, pictures, what the run was made from."""
