"""The grpc.aio flavour: a channel, and native interceptors, whose calls carry valid tokens."""
