"""How requests come in and answers go out: HTTP, lines of JSON, the page, the model of now."""
