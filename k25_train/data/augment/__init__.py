"""Random changes of images that carry coordinates and words of orientation along."""
