"""Who ended an attempt: from evidence to a verdict. Pure; needs the standard library only."""
