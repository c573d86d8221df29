"""What a response is worth: rules, unit tests, rubrics, and how they are put together."""
