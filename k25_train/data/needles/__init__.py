"""Long documents of real text with facts in them and questions behind, from which retrieval is learned."""
