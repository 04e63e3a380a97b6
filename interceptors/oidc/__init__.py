"""The OpenID Connect client: where sessions come from."""
