"""The grpc sync flavour: a channel, and a native interceptor, whose calls carry valid tokens."""
