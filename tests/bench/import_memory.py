"""Memory of an import: `k25-convert import` of a synthetic folder in layers like the released ones.

python -m tests.bench.import_memory --gib 40

Files are sparse: their headers are those of INT4 experts and BF16 matrices in the release's names and shapes, of
as many layers as make `--gib` on disk; what is read of them are zeros. The import runs as a process of its own,
whose resident memory, that of its workers included, is sampled every 10 ms. The figure is the largest sum, next
to the bar, `--memory-gib`. The result is written over and over into the same few files that are deleted when
they are complete, so that it needs little room.
"""
