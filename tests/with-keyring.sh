#!/usr/bin/env bash
# with-keyring.sh COMMAND...: runs it with a session bus and an unlocked gnome-keyring of its own, in a home of its own.
set -eu
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
export HOME=$home XDG_DATA_HOME=$home/data XDG_RUNTIME_DIR=$home/run XDG_CONFIG_HOME=$home/config
export XDG_CACHE_HOME=$home/cache XDG_STATE_HOME=$home/state
mkdir -m 700 -p "$XDG_DATA_HOME/keyrings" "$XDG_RUNTIME_DIR"
# The password must not be empty, or the daemon asks for it.
dbus-run-session -- bash -c '
  eval "$(printf test | gnome-keyring-daemon --unlock --components=secrets 2>"$HOME/keyring.log")"
  exec "$@"' _ "$@"
