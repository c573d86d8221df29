"""Decoupled Encoder Process (DEP): all ranks encode images in equal measure, whoever owns the samples."""
