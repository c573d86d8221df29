"""The model under the released checkpoint's names."""
