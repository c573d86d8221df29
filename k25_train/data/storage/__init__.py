"""Reads that fail, hang or cost requests: attempts, deadlines, a cache on local disk, object stores."""
