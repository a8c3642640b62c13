"""onestep: distil a slow diffusion teacher into a generator that needs one step."""

__version__ = "0.1.0"
