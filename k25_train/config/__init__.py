"""The schema of the configuration: typed sections and the rules within each; torch-free."""
