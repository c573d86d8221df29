"""What a person looks at: statistics of sources, and pages of packed sequences."""
