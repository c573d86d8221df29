"""Numbers of the FP8 format that both its forms need: torch's (`fp8.py`) and Triton's (`fp8_triton.py`)."""

LARGEST = 448.0
"""The largest number of E4M3 (float8_e4m3fn): 1.75 * 2^8."""
SMALLEST_AMAX = LARGEST * 2.0**-116
"""Of smaller tiles, the scale is this one's; `fp8.py` says why under "Small tiles"."""
