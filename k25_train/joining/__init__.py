"""How the ranks of a job find each other, and what is told while they do not."""
