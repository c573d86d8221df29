"""The JSON files of an exported folder that say how text and images become a model's inputs.

vLLM 0.32.0 takes the limits of images from `media_proc_cfg`, and does not start without its keys
(`transformers_utils/processors/kimi_k25_vision_fused.py`). transformers 5.23.0 reads others, and takes mean
and deviation of other models where they are missing (`models/kimi_k25/image_processing_kimi_k25.py`).
"""

from typing import Any

from k25_train.config.model import ModelConfig
from k25_train.config.vision import VisionConfig
from k25_train.data.kimi_tokens import CHAT_TOKENS, SPECIAL_TOKENS
from k25_train.export.hf_config import context_length

_GREY = [0.5, 0.5, 0.5]
"""Mean and deviation of a channel. Source: preprocessor_config.json of the release."""


def preprocessor_config_json(vision: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json: limits of images and video chunks, for vLLM and for transformers."""
    return {
        "image_processor_type": "Kimi_K25ImageProcessor",
        "processor_class": "Kimi_K25Processor",
        "media_proc_cfg": {
            "in_patch_limit": vision.image_patch_limit,
            "patch_size": vision.patch_size,
            "image_mean": _GREY,
            "image_std": _GREY,
            "merge_kernel_size": vision.merge_size,
            "fixed_output_tokens": None,
            "patch_limit_on_one_side": vision.side_patch_limit,
            "in_patch_limit_each_frame": vision.frame_patch_limit,
            "in_patch_limit_video": None,
            "sample_fps": vision.video_fps,
            "max_num_frames_each_video": None,
            "temporal_merge_kernel_size": vision.pos_emb_time,
            "timestamp_mode": "hh:mm:ss.fff",
            "config_type": "media_proc.processors.moonvit.MoonViTMediaProcessorConfig",
        },
        **_transformers_limits(vision, vision.image_patch_limit),
    }


def video_preprocessor_config_json(vision: VisionConfig) -> dict[str, Any]:
    """video_preprocessor_config.json, which transformers alone reads."""
    return {
        "video_processor_type": "Kimi_K25VideoProcessor",
        "processor_class": "Kimi_K25Processor",
        "temporal_patch_size": vision.pos_emb_time,
        "fps": vision.video_fps,
        **_transformers_limits(vision, vision.frame_patch_limit),
    }


def tokenizer_config_json(model: ModelConfig, *, chat_tokens: bool) -> dict[str, Any]:
    """tokenizer_config.json next to a `tokenizer.json` that was trained here."""
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    others = [token for token in SPECIAL_TOKENS if token not in named.values()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length(model.rope),
        "clean_up_tokenization_spaces": False,
        **named,
        "additional_special_tokens": [*others, *(CHAT_TOKENS if chat_tokens else ())],
    }


def _transformers_limits(vision: VisionConfig, patch_limit: int) -> dict[str, Any]:
    side = vision.side_patch_limit
    return {
        "size": {"max_height": side, "max_width": side},
        "max_patches": patch_limit,
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "image_mean": _GREY,
        "image_std": _GREY,
    }
