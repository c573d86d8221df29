"""Which layout is fastest among those that fit: enumerated, bounded, tried; torch-free."""
