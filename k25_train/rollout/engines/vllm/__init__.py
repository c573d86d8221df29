"""vLLM over HTTP: its wire, and the extension that its workers need to take new weights."""
