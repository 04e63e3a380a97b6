"""Connect, sync and async: one interceptor for every generated `connectrpc` client."""
