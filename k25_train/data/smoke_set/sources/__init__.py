"""Sources of the smoke set: each module turns files of pinned packages into samples."""
