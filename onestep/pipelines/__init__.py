"""Pipelines that no stock diffusers class expresses: files of one class each, which exports carry a copy of."""
