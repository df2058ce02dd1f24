#!/bin/bash
# Certificates to try mode mtls with, and for tests. NOT for production: the authority's key lies
# beside what it signs, nothing is ever revoked, and after some days all of it has expired.
#
# usage: deploy/make-test-certs.sh DIR NODE...
#
# DIR/ca.pem, DIR/ca.key: an authority, made if there is none. For each NODE: DIR/NODE.pem and
# DIR/NODE.key, with the one URI name spiffe://DOMAIN/NODE, made anew.
# Environment: KVFERRY_CERT_DAYS (3), KVFERRY_CERT_DOMAIN (kvferry.test).
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 64
fi
dir=$1
shift
days=${KVFERRY_CERT_DAYS:-3}
domain=${KVFERRY_CERT_DOMAIN:-kvferry.test}
curve=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc)

# Runs openssl, which talks much, and shows what it said only if it failed.
quietly() {
  local said
  said=$("$@" 2>&1) || {
    printf '%s\n' "$said" >&2
    return 1
  }
}

umask 077
mkdir -p "$dir"
if [ ! -e "$dir/ca.key" ]; then
  quietly openssl req -x509 "${curve[@]}" -days "$days" -subj "/CN=kvferry test authority" \
    -addext keyUsage=critical,keyCertSign,cRLSign -keyout "$dir/ca.key" -out "$dir/ca.pem"
fi
for node in "$@"; do
  # The new pair takes the old one's place only when it is whole.
  new=$dir/.$node.new
  quietly openssl req "${curve[@]}" -subj "/O=kvferry test" -keyout "$new.key" -out "$new.csr"
  cat >"$new.ext" <<END
subjectAltName = URI:spiffe://$domain/$node
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
END
  quietly openssl x509 -req -in "$new.csr" -CA "$dir/ca.pem" -CAkey "$dir/ca.key" -days "$days" \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$new.ext" -out "$new.pem"
  mv "$new.key" "$dir/$node.key"
  mv "$new.pem" "$dir/$node.pem"
  rm "$new.csr" "$new.ext"
  echo "$dir/$node.pem spiffe://$domain/$node"
done
