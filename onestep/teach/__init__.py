"""Training of the embedded teachers: `python -m onestep.teach fashion`."""
