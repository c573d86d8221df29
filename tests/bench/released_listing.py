"""Does an export of the 1T model have the names, shapes, number formats and file sizes of the release?

`python -m tests.bench.released_listing [--list]`. Nothing is allocated: the tensors are on torch's meta
device. Compared are

- the number of tensors, and the size of all files: 208,550 and 554.3 GiB, moonshotai/Kimi-K2.5;
- every pattern of names with its shape, number format and count, from the release's tensor listing;
- the size of each of the 64 files in bytes, known of moonshotai/Kimi-K2.6, which has the same tensors.

Prints the figure last, and ends with 1 if anything differs.
"""

import argparse
import re
import sys
from collections import Counter

import torch

from k25_train.compose.resolve import compose
from k25_train.export.files import PlannedFile, plan_files
from k25_train.export.listing import WeightFormat, released_tensors
from k25_train.export.stream import TORCH_DTYPES

NUM_TENSORS, TOTAL_GIB = 208_550, 554.30
FILE_BYTES = (
    995_001_888,
    *9 * (9_809_047_464,),
    *51 * (9_809_050_936,),
    4_697_635_160,
    108_556_344,
    833_769_904,
)
"""Of the 64 files in order: layer 0, 1 to 9, 10 to 60; embedding, norm and head; projector; tower."""
_NUMBER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.blocks\.)\d+|(?<=\.experts\.)\d+")
LAYER, TEXT = "language_model.model.layers.*", "language_model"
TOWER, BLOCK = "vision_tower", "vision_tower.encoder.blocks.*"
PATTERNS = {
    f"{TEXT}.lm_head.weight": (1, "BF16", (163840, 7168)),
    f"{TEXT}.model.embed_tokens.weight": (1, "BF16", (163840, 7168)),
    f"{TEXT}.model.norm.weight": (1, "BF16", (7168,)),
    f"{LAYER}.input_layernorm.weight": (61, "BF16", (7168,)),
    f"{LAYER}.post_attention_layernorm.weight": (61, "BF16", (7168,)),
    f"{LAYER}.self_attn.q_a_proj.weight": (61, "BF16", (1536, 7168)),
    f"{LAYER}.self_attn.q_a_layernorm.weight": (61, "BF16", (1536,)),
    f"{LAYER}.self_attn.q_b_proj.weight": (61, "BF16", (12288, 1536)),
    f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight": (61, "BF16", (576, 7168)),
    f"{LAYER}.self_attn.kv_a_layernorm.weight": (61, "BF16", (512,)),
    f"{LAYER}.self_attn.kv_b_proj.weight": (61, "BF16", (16384, 512)),
    f"{LAYER}.self_attn.o_proj.weight": (61, "BF16", (7168, 8192)),
    f"{LAYER}.mlp.gate_proj.weight": (1, "BF16", (18432, 7168)),
    f"{LAYER}.mlp.up_proj.weight": (1, "BF16", (18432, 7168)),
    f"{LAYER}.mlp.down_proj.weight": (1, "BF16", (7168, 18432)),
    f"{LAYER}.mlp.gate.weight": (60, "BF16", (384, 7168)),
    f"{LAYER}.mlp.gate.e_score_correction_bias": (60, "F32", (384,)),
    f"{LAYER}.mlp.shared_experts.gate_proj.weight": (60, "BF16", (2048, 7168)),
    f"{LAYER}.mlp.shared_experts.up_proj.weight": (60, "BF16", (2048, 7168)),
    f"{LAYER}.mlp.shared_experts.down_proj.weight": (60, "BF16", (7168, 2048)),
    **{
        f"{LAYER}.mlp.experts.*.{name}_proj.weight_{part}": (60 * 384, dtype, shape)
        for name, packed, scale in (
            ("gate", (2048, 896), (2048, 224)),
            ("up", (2048, 896), (2048, 224)),
            ("down", (7168, 256), (7168, 64)),
        )
        for part, dtype, shape in (
            ("packed", "I32", packed),
            ("scale", "BF16", scale),
            ("shape", "I32", (2,)),
        )
    },
    "mm_projector.pre_norm.weight": (1, "BF16", (1152,)),
    "mm_projector.pre_norm.bias": (1, "BF16", (1152,)),
    "mm_projector.proj.0.weight": (1, "BF16", (4608, 4608)),
    "mm_projector.proj.0.bias": (1, "BF16", (4608,)),
    "mm_projector.proj.2.weight": (1, "BF16", (7168, 4608)),
    "mm_projector.proj.2.bias": (1, "BF16", (7168,)),
    f"{TOWER}.patch_embed.proj.weight": (1, "BF16", (1152, 3, 14, 14)),
    f"{TOWER}.patch_embed.proj.bias": (1, "BF16", (1152,)),
    f"{TOWER}.patch_embed.pos_emb.weight": (1, "BF16", (64, 64, 1152)),
    **{
        f"{BLOCK}.{name}.{part}": (27, "BF16", shape)
        for name, weight in (
            ("norm0", (1152,)),
            ("norm1", (1152,)),
            ("wqkv", (3456, 1152)),
            ("wo", (1152, 1152)),
            ("mlp.fc0", (4304, 1152)),
            ("mlp.fc1", (1152, 4304)),
        )
        for part, shape in (("weight", weight), ("bias", weight[:1]))
    },
    f"{TOWER}.encoder.final_layernorm.weight": (1, "BF16", (1152,)),
    f"{TOWER}.encoder.final_layernorm.bias": (1, "BF16", (1152,)),
}
"""Name, `*` for numbers -> how many there are, number format and shape. Source: the release's listing."""


def planned() -> list[PlannedFile]:
    """The export of `experiment=k25_pretrain_4k` in INT4."""
    model = compose(["experiment=k25_pretrain_4k"]).model
    return plan_files(released_tensors(model), WeightFormat.int4)


def differences(files: list[PlannedFile]) -> list[str]:
    """What is not as in the release, a line for each."""
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    found = []
    for file in files:
        for entry in file.entries:
            tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")
            if tensor.nbytes != entry.num_bytes:
                found.append(f"{entry.name}: {tensor.nbytes} bytes, but {entry.num_bytes} are planned")
            counts[_NUMBER.sub("*", entry.name), entry.dtype, tuple(tensor.shape)] += 1
    expected = {(name, dtype, shape): number for name, (number, dtype, shape) in PATTERNS.items()}
    for key in sorted(counts.keys() | expected.keys()):
        if counts[key] != expected.get(key, 0):
            name, dtype, shape = key
            found.append(f"{name} {dtype} {list(shape)}: {counts[key]} instead of {expected.get(key, 0)}")
    for index, (file, num_bytes) in enumerate(zip(files, FILE_BYTES, strict=False), 1):
        name = f"model-{index:05d}-of-000064.safetensors"
        if (file.name, file.num_bytes) != (name, num_bytes):
            found.append(f"{file.name}: {file.num_bytes:,} bytes instead of {name}: {num_bytes:,}")
    return found


def main() -> int:
    """Compare, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print every file with its size")
    options = parser.parse_args()
    files = planned()
    if options.list:
        for file in files:
            print(f"{file.name}  {len(file.entries):6,} tensors  {file.num_bytes:14,} bytes")
    found = differences(files)
    print("\n".join(found), end="\n" if found else "")
    num_tensors = sum(len(file.entries) for file in files)
    gib = sum(file.num_bytes for file in files) / 2**30
    is_equal = not found and num_tensors == NUM_TENSORS and round(gib, 2) == TOTAL_GIB
    print(
        f"{num_tensors:,} tensors of {len(PATTERNS)} patterns in {len(files)} files, {gib:.2f} GiB "
        f"(the release: {NUM_TENSORS:,}, {TOTAL_GIB:.2f} GiB; every file of the same size): "
        f"{'equal' if is_equal else 'DIFFERENT'}"
    )
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
