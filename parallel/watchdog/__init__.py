"""Says where a job that hangs is stuck: phases of every rank, who waits for whom, stacks, and a clear end."""
