"""From overrides and YAML files to a typed, checked configuration; torch-free."""
