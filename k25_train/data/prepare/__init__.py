"""A corpus of JSON lines or Parquet, tokenised once into megatron-core's indexed form."""
