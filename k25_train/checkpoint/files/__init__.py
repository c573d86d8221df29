"""The files of a checkpoint's tensors: parts of flat tensors, read and written in ranges, blocks hashed."""
