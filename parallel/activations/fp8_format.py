"""Constants of the FP8 format, shared by both implementations: torch (`fp8.py`), Triton (`fp8_triton.py`)."""

LARGEST = 448.0
"""The largest number of E4M3 (float8_e4m3fn): 1.75 * 2^8."""
SMALLEST_AMAX = LARGEST * 2.0**-116
"""Lower bound of the amax that a scale is computed from; `fp8.py` explains it under "Small tiles"."""
