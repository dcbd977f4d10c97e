#!/usr/bin/env bash
# Certificates for docker-compose.tls.yml: an authority of one's own and the NATS server's certificate signed by it.
#
#   deploy/make_certs.sh FOLDER NAME_OR_ADDRESS…     those by which other machines call this one
#
# FOLDER gets ca.crt (every machine needs it), ca.key (keep it off the machines), server.crt and server.key. An authority that is
# there is used again: so a certificate for more names, or a new one after a year, needs no new ca.crt anywhere.
set -euo pipefail
umask 077

[ $# -ge 2 ] || { echo "usage: deploy/make_certs.sh FOLDER NAME_OR_ADDRESS…" >&2; exit 2; }
folder=$1
shift
names=DNS:nats,DNS:localhost,IP:127.0.0.1
for name; do
    if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
done

mkdir -p "$folder"
cd "$folder"
if [ ! -e ca.crt ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=flotilla" \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.crt 2>/dev/null
fi
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=nats" -keyout server.key -out server.csr 2>/dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out server.crt 2>/dev/null \
    -extfile <(printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n' "$names")
rm -f server.csr ca.srl
# Read by the containers' user.
chmod 644 ca.crt server.crt
chmod 755 .
echo "made $folder/server.crt for $names"
