"""An HTTP server with the routes of OpenAI's API, in front of a running Triton server."""
