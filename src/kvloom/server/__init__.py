"""The HTTP API: OpenAI's routes and error shapes around one engine in its own thread."""
