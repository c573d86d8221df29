"""Generative reward models: a model scores answers by rubrics, on top of what rules have verified."""
