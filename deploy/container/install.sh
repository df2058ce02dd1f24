#!/bin/sh
# install.sh PACKAGES: what the image holds, from a bare Debian 12 and the packages in that folder. A script of
# its own so that deploy/test-packages.sh can run it where there is no builder of images.
set -eu
packages=$1
# Fixed, for manifests; the package takes the user that is there.
groupadd --gid 10464 kvferry
useradd --uid 10464 --gid 10464 --home-dir / --no-create-home --shell /usr/sbin/nologin kvferry
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "$packages"/kvferryd_*.deb "$packages"/kvferry-tools_*.deb
apt-get clean
rm -rf /var/lib/apt/lists/*
install -d -o 10464 -g 10464 -m 0750 /run/kvferry
