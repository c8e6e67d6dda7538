#!/bin/bash
# Install Debian packages for tests, where a command of theirs is missing and this is allowed: as
# root.
#
#   tests/support/debian_packages.sh "COMMAND..." PACKAGE...
#
# Exit status 77: the commands cannot be had on this machine, and why.
set -euo pipefail

read -ra commands <<<"$1"
shift
export PATH=$PATH:/usr/sbin:/sbin # where daemons are, and which not everybody has there

cannot() {
  echo "$*" >&2
  exit 77
}

there() { type "${commands[@]}" &>/dev/null; }

install() {
  apt-get install -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "$@"
}

if there; then exit; fi
command -v apt-get >/dev/null || cannot "$1 is not installed, and there is no apt-get"
[ "$(id -u)" = 0 ] || cannot "$1 is not installed, and only root can install it"
exec 9</var/lib/dpkg && flock 9 # tests run side by side, and apt-get does not wait for each lock
if there; then exit; fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The index may be old or absent.
install "$@" &>"$log" || { apt-get update -qq && install "$@"; } &>>"$log" ||
  cannot "$1 cannot be installed: $(tail -n 1 "$log")"
