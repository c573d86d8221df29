"""What is trained for: from losses per token to what goes backward and what is reported."""
