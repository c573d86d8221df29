"""SGLang over HTTP: its wire. Written from its documentation and source, and tried on a stub alone."""
