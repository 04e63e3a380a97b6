"""Where sessions are kept: one small interface, one module for each place."""
