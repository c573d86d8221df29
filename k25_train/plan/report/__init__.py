"""What the planner counted, as tables, lines of text and JSON."""
