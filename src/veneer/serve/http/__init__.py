"""The server over HTTP: OpenAI's interface, vLLM's adapter endpoints, metrics and a page."""
