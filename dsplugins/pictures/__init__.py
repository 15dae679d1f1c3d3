"""Pictures of a run, from its run directory: what event plugins draw at the end and `report` at any time."""
