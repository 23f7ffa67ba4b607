#!/usr/bin/env bash
# Nix 2.8.0: after `nix copy --to http://cache`, the client that wrote a path never asks the cache for its narinfo. It has
# put the narinfo that it sent into its own disk cache, and believes that for narinfo-cache-positive-ttl, 30 days. A cache
# that signs what it takes, or that stores the NAR under another name, therefore looks to its writer as if it had done
# neither: `nix path-info --store`, `nix store verify` and remote builds show no signature and ask for the old name. A check
# of a cache from the machine that filled it proves nothing unless it sets the ttl to 0.
set -euo pipefail

package=nix-bin version=2.8.0
scratch=$(mktemp -d)
server=
trap 'kill "$server" 2>/dev/null || true; chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
cd "$scratch"

# The package with all that it links, unpacked and not installed.
mkdir -p lists/partial cache/archives/partial root
: >status
apt=(apt-get -qq -o Dir::State::Lists="$scratch/lists" -o Dir::Cache="$scratch/cache"
  -o Dir::State::status="$scratch/status" -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update
exact=$(apt-cache -o Dir::State::Lists="$scratch/lists" -o Dir::Cache="$scratch/cache" madison "$package" |
  awk '{print $3}' | grep -E "^$version([+-]|\$)" | head -n 1)
[ -n "$exact" ] || { echo "no $package $version in the machine's package sources" >&2 && exit 69; }
"${apt[@]}" install --download-only --no-install-recommends --yes "$package=$exact"
for deb in cache/archives/*.deb; do dpkg-deb -x "$deb" root; done

# A cache that keeps what is put into it, and adds a signature to each narinfo that it serves.
cat >server.py <<'END'
import http.server, os

class Cache(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body=b""):
        with open("requests", "a") as log:
            log.write(f"{self.command} {self.path}\n")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def file(self):
        return os.path.join("kept", self.path.strip("/").replace("/", "_"))

    def do_GET(self):
        if not os.path.exists(self.file()):
            return self.reply(404)
        with open(self.file(), "rb") as kept:
            body = kept.read()
        if self.path.endswith(".narinfo"):
            body += b"Sig: of-the-server:" + b"A" * 86 + b"==\n"
        self.reply(200, body)

    do_HEAD = do_GET

    def do_PUT(self):
        with open(self.file(), "wb") as kept:
            kept.write(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(200)

os.makedirs("kept")
with open("kept/nix-cache-info", "w") as info:
    info.write("StoreDir: /nix/store\n")
server = http.server.HTTPServer(("127.0.0.1", 0), Cache)
with open("port", "w") as port:
    port.write(str(server.server_port))
server.serve_forever()
END
timeout 120 python3 server.py &
server=$!
until [ -s port ]; do sleep 0.1; done
cache=http://127.0.0.1:$(cat port)

loader=$(find root -name 'ld-linux-x86-64.so.2' | head -n 1)
libraries=$(find "$scratch/root" -type d -name 'x86_64-linux-gnu' | paste -sd:)
nix() {
  env -i HOME="$scratch/home" PATH=/usr/bin:/bin NIX_CONF_DIR="$scratch/etc" NIX_REMOTE="$scratch/store" \
    NIX_CONFIG=$'experimental-features = nix-command\nsubstituters =\nbuild-users-group =' \
    "$loader" --library-path "$libraries" root/usr/bin/nix "$@"
}
mkdir -p home etc
echo content >file

nix --version
path=$(nix store add-path ./file)
nix copy --to "$cache" "$path"
: >requests
signatures() {
  nix path-info --json --store "$cache" "$@" "$path" |
    python3 -c 'import json, sys; print(len(json.load(sys.stdin)[0].get("signatures", [])))'
}
seen=$(signatures)
asked=$(grep -c . requests || true)
seen_anew=$(signatures --narinfo-cache-positive-ttl 0)
echo "the writer sees $seen signatures, after $asked requests; with a ttl of 0 it sees $seen_anew"
[ "$seen" = 0 ] && [ "$asked" = 0 ] && [ "$seen_anew" = 1 ]
