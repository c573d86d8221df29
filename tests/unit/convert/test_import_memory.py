"""What a piece takes while it is made is within what the limit of memory is divided by."""

from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from k25_train.convert.hf_files import open_folder
from k25_train.convert.importing import resident_bytes
from k25_train.convert.mapping import PlannedTensor, Segment
from k25_train.convert.names import Change
from k25_train.convert.number_formats import BYTES_PER_ELEMENT, find_weights
from k25_train.convert.unit_writer import made
from k25_train.convert.units import Piece
from tests.helpers.hf_folders import write_folder

ROWS, COLUMNS = 2048, 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["F32", "BF16", "FP8", "INT4"])
def test_bytes_per_element(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = (ROWS, COLUMNS)
    state = {"w": torch.ones(shape, dtype=torch.float32 if form == "F32" else torch.bfloat16)}
    if form == "FP8":
        scales = torch.ones(ROWS // 128, COLUMNS // 128)
        state = {"w": torch.ones(shape).to(torch.float8_e4m3fn), "w_scale_inv": scales}
    elif form == "INT4":
        state = {"w_packed": torch.zeros(ROWS, COLUMNS // 8, dtype=torch.int32)}
        state["w_scale"] = torch.ones(ROWS, COLUMNS // 32, dtype=torch.bfloat16)
        state["w_shape"] = torch.tensor(shape, dtype=torch.int32)
    weight = find_weights(open_folder(write_folder(tmp_path / "hf", state, {}, num_files=1)).tensors)["w"]
    del state
    segment = Segment(weight, Change.none, ROWS * COLUMNS)
    piece = Piece(segment, 0, ROWS * COLUMNS)
    # What was freed goes back to the kernel, which forgets the largest resident memory so far.
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()
    assert made(piece, PlannedTensor("w", shape, dtype, (segment,)), 1).dtype is dtype
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert peak - before < BYTES_PER_ELEMENT * ROWS * COLUMNS, f"{(peak - before) / ROWS / COLUMNS:.1f}"
    # And the test sees what is taken.
    assert peak - before > dtype.itemsize * ROWS * COLUMNS / 2
